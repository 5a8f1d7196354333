"""A registered model as MLflow runs it."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pomona.core.errors import RequestError
from pomona.model import artifact
from pomona.registry import publish, pyfunc
from tests.conftest import photo
from tests.registry.conftest import answer, free_port, store

pytest.importorskip("mlflow")
pytest.importorskip("sklearn")

# MLflow and SQLAlchemy warn of each other's deprecations when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_what_the_column_may_hold(out: Path) -> None:
    good = photo(5)
    text = base64.b64encode(good).decode()
    lines = "\n".join(text[n : n + 76] for n in range(0, len(text), 76))
    served = pyfunc._load_pyfunc(str(out / "model"))
    cells = [good, text, lines, "no base64!", "Zm9v", "", None, float("nan"), memoryview(good)]
    rows = served.predict([{"image": cell} for cell in cells]).to_dict(orient="records")
    wanted = answer(artifact.load_model(out / "model"), good)
    assert [rows[n] for n in (0, 1, 2, 8)] == [wanted] * 4
    assert [row["error"] for row in rows[3:8]] == [
        *["not_an_image"] * 2,
        "empty",
        *["unreadable"] * 2,
    ]
    assert rows[3] == {**dict.fromkeys(wanted), "error": "not_an_image"}
    assert len(served.predict([{"image": good}], {"top": 1})["nearest"][0]) == 1
    assert served.predict([]).empty
    with pytest.raises(RequestError, match="--top is at least 1"):
        served.predict([{"image": good}], {"top": 0})


@pytest.fixture
def server(out: Path, tmp_path: Path) -> Iterator[str]:
    """``mlflow models serve``, as a user starts it."""
    publish.publish(out)
    port = free_port()
    command = "-m mlflow models serve -m models:/pomona@champion --env-manager local -p"
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    log = (tmp_path / "server.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, *command.split(), str(port)],
        env={**os.environ, "MLFLOW_TRACKING_URI": store(out), "PATH": tools},
        cwd=tmp_path,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 600
        while not answers(f"{address}/ping"):
            log_text = (tmp_path / "server.log").read_text()
            assert process.poll() is None, log_text
            assert time.monotonic() < until, log_text
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@pytest.mark.slow
def test_mlflow_serves_it(server: str, out: Path) -> None:
    good = photo(5)
    text = base64.b64encode(good).decode()

    def ask(body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{server}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.load(reply)["predictions"]

    model = artifact.load_model(out / "model")
    (row,) = ask({"dataframe_split": {"columns": ["image"], "data": [[text]]}})
    assert row == answer(model, good)
    rows = ask({"inputs": [{"image": text}, {"image": "no base64!"}], "params": {"top": 2}})
    assert rows[0]["nearest"] == row["nearest"][:2]
    assert rows[1] == answer(model, b"no image")
