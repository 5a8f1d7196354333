"""Spark and processes make the same tables, and one finishes what the other began."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pomona.core.progress import Tick
from pomona.pipeline.extract import extract
from pomona.pipeline.reduce import ReduceOptions, reduce
from tests import bad_decoder
from tests.conftest import fill
from tests.pipeline.conftest import QUICK, rows

FEW = ReduceOptions(components=5, plots=False)
Use = Callable[[str], None]


@pytest.fixture
def use(spark: Any, workers: Any, monkeypatch: pytest.MonkeyPatch) -> Use:
    """Choose the engine: ``spark`` or ``processes``."""

    def choose(engine: str) -> None:
        active = spark if engine == "spark" else None
        monkeypatch.setattr("pomona.pipeline.engines.active_session", lambda: active)

    return choose


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough for several tasks of each engine."""
    source = fill(tmp_path_factory.mktemp("photos") / "source", each=50)
    (source / "Training" / "Fruit 0" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    return source


def test_the_same_to_the_bit(use: Use, photos: Path, tmp_path: Path) -> None:
    digests = {}
    for engine in ("spark", "processes"):
        use(engine)
        extracted = extract(photos, tmp_path / engine, QUICK)
        reduced = reduce(tmp_path / engine, FEW)
        digests[engine] = (extracted["digests"], extracted["rejected"], reduced["digests"])
    assert digests["spark"] == digests["processes"]


def interrupt(tick: Tick) -> None:
    if tick.stage == "extract" and 0 < tick.done < tick.total:
        raise KeyboardInterrupt


@pytest.mark.parametrize("first", ["spark", "processes"])
def test_one_finishes_what_the_other_began(
    use: Use, first: str, photos: Path, tmp_path: Path
) -> None:
    use("processes")
    whole = extract(photos, tmp_path / "whole", QUICK)
    out = tmp_path / "out"
    use(first)
    with pytest.raises(KeyboardInterrupt):
        extract(photos, out, QUICK, on_tick=interrupt)
    parts = sorted(out.glob("_work/parts-*/*.parquet"))
    for part in parts[len(parts) // 2 :]:  # what was under way may have ended all the same
        part.unlink()
    use("spark" if first == "processes" else "processes")
    record = extract(photos, out, QUICK)
    assert 0 < record["times"]["computed"] < whole["photos"]
    assert record["digests"] == whole["digests"]


@pytest.mark.slow
def test_a_photo_that_ends_or_stalls_its_worker(tmp_path: Path) -> None:
    """It costs itself through the whole run and its report, on processes.

    On a cluster, and in a session of the user's: tests/spark/test_cluster.py.
    """
    source, out = fill(tmp_path / "source", each=20), tmp_path / "out"
    clean = tmp_path / "clean"
    extract(source, clean, QUICK)
    bad_decoder.add_photos(source)
    environment = os.environ | bad_decoder.install(tmp_path / "bad")
    words = ["run", source, "--out", out, "--weights", "random:0", "--image-size", "32", "--device"]
    words += ["cpu", "--no-mlflow", "--json"]
    told = subprocess.run(
        [sys.executable, "-m", "pomona", *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["extract"]["rejected"] == {"crashed": 2}
    there = {row["path"]: row for row in rows(out)}
    crashed = {Path(path).stem for path, row in there.items() if row["error"]}
    assert crashed == {"crashes", "hangs"}
    for row in rows(clean):
        assert there[row["path"]]["features"] == row["features"]
    assert "crashes.jpg" in (out / "report" / "report.html").read_text(encoding="utf-8")
