"""Real processes, killed: nothing lost, nothing twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from pomona.pipeline.status import status
from tests.conftest import fill

PHOTOS = 3 * 2 * 120
PATIENCE = 600
"""Seconds that a process may take on a busy machine."""

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-m", "pomona", "extract"]
OPTIONS = ["--weights", "fruits", "--image-size", "96", "--device", "cpu", "--json"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("kill") / "source", each=120)


def start(source: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, str(source), "--out", str(out), *OPTIONS, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(source: Path, out: Path, *options: str) -> dict[str, Any]:
    process = start(source, out, *options)
    told, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(told)["extract"]
    return found


def table(out: Path) -> list[dict[str, Any]]:
    files = sorted((out / "features").glob("split=*/*.parquet"))
    return [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]


def wait_for_parts(out: Path, process: subprocess.Popen[str], count: int = 1) -> None:
    while len(list(out.glob("_work/parts-*/*.parquet"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


STAGES = {
    "extracting features": (4, 1.0),
    "writing the table": (2, 0.1),
    "reducing": (2, 0.2),
    "training": (1, 0.5),
}
"""Kills in each stage of a run, by what it says of itself, and the seconds in which they fall."""


def kill_in(stage: str, seconds: float, words: list[str]) -> str:
    """Kill a run after some seconds of a stage; return the stage that it was in."""
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stderr
        line = next((line for line in process.stderr if line.startswith(stage)), "")
        time.sleep(seconds)
        process.kill()
        lines = [line, *process.stderr]
    assert not any("Warning" in line for line in lines), lines
    return str(lines[-1].partition(":")[0])


def test_killed_in_every_stage(photos: Path, tmp_path: Path) -> None:
    """At random moments of extraction, of compaction, of reduce and of train."""
    pytest.importorskip("sklearn")

    def words(out: str) -> list[str]:
        more = ["--components", "5", "--no-plots", "--no-mlflow"]
        command = [sys.executable, "-m", "pomona", "run", str(photos)]
        return [*command, "--out", str(tmp_path / out), *OPTIONS, *more]

    told = subprocess.run(words("whole"), capture_output=True, text=True, check=True)
    whole = json.loads(told.stdout)
    rng = random.Random(0)
    killed = Counter[str]()
    computed = []
    for stage, (times, seconds) in STAGES.items():
        for _ in range(times):
            killed[kill_in(stage, rng.uniform(0, seconds), words("killed"))] += 1
            computed.append(status(tmp_path / "killed")["done"])
    assert computed == sorted(computed), "work that was done is never lost"
    assert killed["extracting features"] >= killed.total() / 3, killed
    assert killed["writing the table"] and killed["reducing"], killed
    last = json.loads(
        subprocess.run(words("killed"), capture_output=True, text=True, check=True).stdout
    )
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
    for name in ("extract", "reduce", "train"):
        assert last[name]["digests"] == whole[name]["digests"], name
    assert not (tmp_path / "killed" / "_work").exists()


def test_an_interrupt_stops_the_work(tmp_path: Path) -> None:
    """SIGTERM, which becomes what Ctrl-C is; test_predict sends SIGINT.

    It ends with photos left to do; on a busy machine seconds would say nothing. Photos are
    stretched to a size at which all of them take longer than any process takes to end.
    """
    source = fill(tmp_path / "source", each=50)
    out, large = tmp_path / "out", ("--image-size", "448")
    process = start(source, out, *large)
    wait_for_parts(out, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "pomona: stopped; run the same command again to go on"
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    done = status(out)["done"]
    assert 0 < done < 300
    assert finish(source, out, *large)["times"]["computed"] == 300 - done


def test_a_second_run_is_refused(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(photos, out)
    wait_for_parts(out, process)
    assert status(out)["running"]
    second = start(photos, out)
    _, errors = second.communicate(timeout=PATIENCE)
    assert second.returncode == 2
    assert "another pomona run is at work" in errors.splitlines()[-1]
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_killed_worker_costs_nothing(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(photos, out)
    wait_for_parts(out, process)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "LokyProcess" in " ".join(child.cmdline())
    ]
    assert workers
    os.kill(workers[0].pid, signal.SIGKILL)
    told, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert json.loads(told)["extract"]["photos"] == PHOTOS
    assert "a worker died and is replaced" in (out / "pomona.log").read_text()
    assert len({row["path"] for row in table(out)}) == len(table(out)) == PHOTOS
