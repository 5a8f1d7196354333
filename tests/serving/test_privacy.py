"""Nothing of a photo or of who asked is kept or told."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.formparsers import MultiPartParser

from pomona.model.artifact import Model
from pomona.serving import uploads
from pomona.serving.app import create
from tests.conftest import photo
from tests.service import running, send, send_form


def test_logs_and_metrics_tell_nothing_of_who_asked(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with running(create(lambda: model)) as url:
        files = {"photo": ("ann smith.jpg", photo(1), "image/jpeg")}
        reply = httpx.post(url + "/v1/predict?top=2&who=ann", files=files)
        assert reply.status_code == 200
        httpx.get(url + "/ann-smith")
        figures = httpx.get(url + "/metrics").text
    lines = [r.getMessage() for r in caplog.records if r.name == "pomona.access"]
    assert lines[0].startswith("POST /v1/predict 200 ")
    assert lines[1].startswith("GET other 404 ")
    ours = "\n".join(r.getMessage() for r in caplog.records if not r.name.startswith("http"))
    for text in (ours, figures):
        assert "ann" not in text.replace("channel", "")
        assert "127.0.0.1" not in text
    assert 'pomona_request_seconds_count{route="/v1/predict"} 1.0' in figures
    assert "pomona_queue_photos 0.0" in figures
    assert "process_resident_memory_bytes" in figures


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
TRACED: dict[str, list[tuple[Any, ...]] | None] = {"opened": None}


def hook(event: str, words: tuple[Any, ...]) -> None:
    opened = TRACED["opened"]
    if opened is None or not event.startswith(("open", "os.open", "os.mkdir", "os.mkfifo", "shm_")):
        return
    writes = event != "open" or (words[2] & WRITING) or set(words[1] or "") & set("wax+")
    if writes:
        opened.append((event, *words))


@contextlib.contextmanager
def writing_traced() -> Iterator[list[tuple[Any, ...]]]:
    """Every file that this process, the server's too, opens to write, whatever opens it.

    An audit hook can't be removed: it is added once, and sleeps.
    """
    if "added" not in TRACED:
        TRACED["added"] = None
        sys.addaudithook(hook)
    opened: list[tuple[Any, ...]] = []
    TRACED["opened"] = opened
    try:
        yield opened
    finally:
        TRACED["opened"] = None


def large_photo() -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    assert len(file.getvalue()) > 4 << 20
    return file.getvalue()


def test_no_photo_reaches_the_disk(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in a form, for features, and one that can't be used: no file is opened to write."""
    large = large_photo()
    asks: list[Callable[[], Any]] = [
        lambda: send(url, large),
        lambda: send_form(url, large, photo(1)),
        lambda: send_form(url, large, large, path="/v1/features"),
        lambda: send(url, large[: 2 << 20]),
        lambda: send_form(url, large[: 2 << 20], b"no photo"),
    ]
    for ask in asks:  # what is imported at first may be compiled into files
        ask()
    with writing_traced() as opened:
        assert [ask().status_code for ask in asks] == [200, 200, 200, 422, 200]
    assert opened == []
    # The trace sees what it is for: the framework's own parser spools a large file.
    monkeypatch.setattr(uploads._InMemory, "spool_max_size", MultiPartParser.spool_max_size)
    with writing_traced() as opened:
        assert asks[1]().status_code == 200
    assert opened != []


def test_no_photo_reaches_the_disk_of_the_whole_process(model: Model, tmp_path: Path) -> None:
    """By the kernel's word: threads, libraries in C, and the children that decode."""
    if (
        not shutil.which("strace")
        or subprocess.run(["strace", "-qq", "true"], check=False).returncode
    ):
        pytest.skip("no strace here, or it may not trace")
    trace = tmp_path / "trace"
    words = [sys.executable, "-m", "pomona", "serve", "--model", str(model.folder), "--port", "0"]
    calls = "trace=open,openat,openat2,creat,memfd_create"
    traced = ["strace", "-D", "-f", "-qq", "-e", calls, "-o", str(trace), *words, "--isolate"]
    with subprocess.Popen(traced, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        url = next(found[0] for line in lines if (found := re.search(r"http://[\d.:]+", line)))
        try:
            for _ in range(2):
                begun = trace.stat().st_size
                assert send_form(url, large_photo(), photo(1)).status_code == 200
        finally:
            process.send_signal(
                signal.SIGINT
            )  # with -D strace is no parent: it reaches the service
            try:
                process.wait(60)
            finally:
                process.kill()
    calls_then = trace.read_bytes()[begun:].decode(errors="replace").splitlines()
    writing = [
        line for line in calls_then if re.search("O_WRONLY|O_RDWR|O_CREAT|creat|memfd", line)
    ]
    assert [line for line in writing if '"/dev/null"' not in line] == []
    assert "O_RDONLY" in trace.read_text(errors="replace")
