"""OUTs, places to copy them to, and a lock that is quick."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pomona.workspace import lease, remote
from pomona.workspace.lease import LOCK
from pomona.workspace.remote_folder import Place, open_place
from pomona.workspace.sync_state import RECORD
from tests.faults import Proxy
from tests.object_stores import upload


@pytest.fixture(autouse=True)
def _in_haste(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, seconds in (("SETTLE", 0.0), ("SILENT", 1.0), ("REFRESH", 0.1)):
        monkeypatch.setattr(lease, name, seconds)
    monkeypatch.setattr(remote, "PUSH_EVERY", 0.1)
    monkeypatch.setenv("POMONA_CACHE", str(tmp_path / "cache"))


def make_out(root: Path, salt: str = "") -> Path:
    """A finished OUT, as far as copying can tell."""
    files = {
        "features/split=Test/part-00000-00000.parquet": f"test {salt}",
        "features/split=Training/part-00000-00000.parquet": "training",
        "training_pca/label=50%25 é/part-00000.parquet": "pca",
        "model/model.onnx": "onnx",
        "model/model.json": "{}",
        "manifest.json": json.dumps({"format": 1, "salt": salt}),
        "features/_table.json": json.dumps({"format": 1, "files": {"x": {}}, "source": "s"}),
        ".lock": "",
        "_work/leftover": "x",
    }
    for name, text in files.items():
        write(root / name, text)
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def tree(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(".") and "_work" not in path.parts
    }


@pytest.fixture
def bucket(store: str, through: Proxy, tmp_path: Path) -> str:
    """A new prefix, through the proxy."""
    upload(store, "bucket", {})
    name = hashlib.sha256(str(tmp_path).encode()).hexdigest()[:8]
    return f"s3://bucket/{name}/out?{through.options}"


def there(place: str) -> dict[str, bytes]:
    found = open_place(place)
    own = (RECORD, LOCK)
    return {name: found.read_bytes(name) for name in found.sizes() if name not in own}


def put(gate: Proxy) -> list[str]:
    """Names that were written, in order, without the bookkeeping."""
    found = [path.split("/out/")[1] for m, path in gate.log if m == "PUT" and "/out/" in path]
    return [name for name in found if name and not name.startswith(("_push", "_lock"))]


def lock_of(place: Place, **about: Any) -> None:
    known = {"id": "other", "pid": 1, "host": "elsewhere", "since": "then"}
    place.write_json(LOCK, {**known, "refreshed": time.time(), **about})


def pomona(*words: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pomona", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )


def wait_until(true: Callable[[], Any], seconds: float = 600, what: Any = None) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        assert what is None or what.poll() is None, what.communicate()
        time.sleep(0.2)
