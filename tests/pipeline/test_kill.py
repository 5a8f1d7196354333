"""Real processes, killed: nothing lost, nothing twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
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


def test_killed_at_random_moments(photos: Path, tmp_path: Path) -> None:
    reference = finish(photos, tmp_path / "whole")
    out = tmp_path / "killed"
    rng = random.Random(0)
    computed = []
    for _ in range(5):
        process = start(photos, out)
        try:
            process.wait(timeout=rng.uniform(0.3, 9))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        if (out / "features" / "_table.json").exists():
            found = status(out)
            computed.append(found["done"])
            assert found["photos"] in (0, PHOTOS)
    assert computed == sorted(computed), "work that was done is never lost"
    last = finish(photos, out)
    assert last["times"]["computed"] <= PHOTOS - (computed[-1] if computed else 0)
    assert table(out) == table(tmp_path / "whole")
    assert last["digests"] == reference["digests"]
    assert not (out / "_work").exists()


def test_an_interrupt_stops_the_work(photos: Path, tmp_path: Path) -> None:
    """SIGTERM, which becomes what Ctrl-C is; test_predict sends SIGINT.

    It ends with photos left to do; on a busy machine seconds would say nothing. Photos are
    stretched to a size at which all of them take longer than any process takes to end.
    """
    out, large = tmp_path / "out", ("--image-size", "448")
    process = start(photos, out, *large)
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
    assert 0 < done < PHOTOS
    assert finish(photos, out, *large)["times"]["computed"] == PHOTOS - done


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
        if child.status() != psutil.STATUS_ZOMBIE
        and "pyspark.daemon" in " ".join(child.cmdline())
        and not child.children()
    ]
    assert workers
    os.kill(workers[0].pid, signal.SIGKILL)
    told, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert json.loads(told)["extract"]["photos"] == PHOTOS
    assert len({row["path"] for row in table(out)}) == len(table(out)) == PHOTOS
