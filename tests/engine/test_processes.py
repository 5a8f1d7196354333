"""Processes of this machine that run tasks: errors, deaths, interrupts, and what they inherit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pomona.core.errors import JobError, RequestError
from pomona.engine import processes
from pomona.engine.processes import Processes
from pomona.pipeline.engines import open_engine
from pomona.spark.engine import SparkEngine
from pomona.spark.session import Cluster

PATIENCE = 300
"""Seconds that an event may take on a busy machine."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Processes]:
    with Processes(2) as started:
        yield started


def about(number: int) -> dict[str, Any]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        "number": number,
        "pid": os.getpid(),
        "sigint": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
        "threads": [os.environ.get(name) for name in names],
        "main": sys.modules["__main__"].__name__,
    }


def test_answers_come_in_order_from_workers_of_one_thread(pool: Processes, tmp_path: Path) -> None:
    answers = pool.run_tasks(about, 20, tmp_path)
    assert [answer["number"] for answer in answers] == list(range(20))
    assert os.getpid() not in {answer["pid"] for answer in answers}
    assert all(answer["sigint"] for answer in answers)
    assert {tuple(answer["threads"]) for answer in answers} == {("1", "1")}
    assert pool.run_tasks(about, 0, tmp_path) == []
    assert pool.run_tasks(about, 1, tmp_path)[0]["pid"] == os.getpid(), "no worker for one task"


def divide(number: int) -> dict[str, Any]:
    return {"x": 1 / (number - 1)}


def refuse(number: int) -> dict[str, Any]:
    raise RequestError("no such thing: take another")


def test_errors(tmp_path: Path) -> None:
    with Processes(2) as pool:
        with pytest.raises(JobError, match=r"a worker failed: division by zero\. What is done"):
            pool.run_tasks(divide, 3, tmp_path)
        with pytest.raises(RequestError, match=r"^no such thing: take another$"):
            pool.run_tasks(refuse, 2, tmp_path)
        assert pool.run_tasks(about, 2, tmp_path), "the next tasks have new workers"


class DieOnce:
    """A task whose worker is killed the first time, as by the system's memory killer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, number: int) -> dict[str, Any]:
        mark = self.folder / f"{number}"
        if number == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"number": number}


def die(number: int) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_a_worker_that_is_killed_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Processes(2) as pool:
        answers = pool.run_tasks(DieOnce(tmp_path), 8, tmp_path)
        assert [answer["number"] for answer in answers] == list(range(8))
        assert pool.replaced == 1
        assert "a worker died and is replaced" in caplog.text
        with pytest.raises(JobError, match=r"workers died 4 times at the same task.*memory"):
            pool.run_tasks(die, 2, tmp_path)


def test_a_container_with_fewer_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "available_cpus", lambda: 3)
    assert Processes().slots == 3
    assert Processes(5).slots == 5


def test_workers_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from pomona.backbone.spec import BackboneSpec

    monkeypatch.setattr(processes, "available_cpus", lambda: 16)
    pool = Processes(device="cuda")
    spec = pool.fit(BackboneSpec("x", "x", device="cuda"))
    assert (pool.slots, spec.threads, spec.memory_share) == (2, 8, 0.45)
    alone = Processes(1, device="cuda")
    assert alone.fit(BackboneSpec("x", "x", device="cuda")).memory_share == 0.9
    assert Processes().fit(BackboneSpec("x", "x")).threads == 1


@pytest.mark.own_workers
def test_which_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_engine(Cluster()), Processes)
    assert isinstance(open_engine(Cluster("local[2]")), SparkEngine)
    assert isinstance(open_engine(Cluster(), needs_spark=True), SparkEngine)
    monkeypatch.setattr("pomona.pipeline.engines.active_session", object)
    assert isinstance(open_engine(Cluster()), SparkEngine)


SCRIPT = """
import sys, time
from pathlib import Path
from pomona.engine.processes import Processes

def slow(number):
    import os, time
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(1000)

with Processes(2) as pool:
    pool.run_tasks(slow, 2, Path(sys.argv[1]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("way", ["-c", "script without a main guard"])
def test_workers_end_with_the_driver(how: signal.Signals, way: str, tmp_path: Path) -> None:
    """Also in the middle of a task; the driver's ``__main__`` isn't run again by workers."""
    folder = tmp_path / "pids"
    folder.mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    words = ["-c", SCRIPT] if way == "-c" else [str(tmp_path / "script.py")]
    process = subprocess.Popen(
        [sys.executable, *words, str(folder)], stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + PATIENCE
    while len(list(folder.iterdir())) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    workers = [psutil.Process(int(path.name)) for path in folder.iterdir()]
    process.send_signal(how)
    _, errors = process.communicate(timeout=PATIENCE)
    assert "Warning" not in errors
    _, alive = psutil.wait_procs(workers, PATIENCE)
    assert not alive
    assert len(list(folder.iterdir())) == 2, "the script ran once"


def test_what_workers_print_goes_to_the_log(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom pomona.engine.processes import Processes\n"
        "def say(number):\n"
        "    import logging\n    print('aloud')\n    logging.getLogger('pomona').warning('quiet')\n"
        "    return {}\n"
        "with Processes(2, Path(sys.argv[1])) as pool:\n    pool.run_tasks(say, 2, Path('.'))\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "log")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (told.stdout, told.stderr) == ("", "")
    assert (tmp_path / "log").read_text().count("quiet") == 2
    assert json.dumps((tmp_path / "log").read_text()).count("aloud") == 2
