"""The stages together, their Spark session, and the images of a notebook."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pomona.core.errors import JobError, RequestError, SourceError
from pomona.pipeline.extract import ExtractOptions, extract
from pomona.pipeline.extract_task import photos_per_task
from pomona.pipeline.reduce import ReduceOptions, reduce
from pomona.pipeline.run import run
from pomona.pipeline.status import status
from pomona.spark import tasks
from pomona.spark.resources import slots
from pomona.spark.session import Cluster, check_java
from tests.conftest import photo
from tests.pipeline.conftest import FRUITS as QUICK
from tests.pipeline.conftest import Extracted, outputs

FEW = ReduceOptions(components=5)


def test_two_identical_runs_differ_only_in_times(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(source, tmp_path / name, QUICK, FEW, train_options=None)
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two")


def test_tasks_that_fail_name_the_reason(spark: Any) -> None:
    with pytest.raises(
        JobError, match=r"ZeroDivisionError: division by zero.*run the same command"
    ):
        tasks.run_tasks(spark, _divide, 2)


def _divide(number: int) -> dict[str, Any]:
    return {"x": 1 / (number - 1)}


def test_java_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pomona.core.errors import MissingError

    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(MissingError, match=r"no Java was found.*apt-get.*brew.*winget"):
        check_java()
    (tmp_path / "bin").mkdir()
    java = tmp_path / "bin" / "java"
    java.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\" 2019-01-15' >&2\n")
    java.chmod(0o755)
    with pytest.raises(MissingError, match="Java 11 was found"):
        check_java()


def test_load_images(spark: Any, source: Path) -> None:
    import pomona

    frame = pomona.load_images(spark, str(source), "Training")
    assert frame.columns == ["path", "content", "label", "filename"]
    found = frame.collect()
    assert len(found) == 24
    assert all(bytes(r["content"]) == (source / r["path"]).read_bytes() for r in found)
    assert pomona.load_images(spark, str(source)).count() == 48
    with pytest.raises(RequestError, match="Training or Test"):
        pomona.load_images(spark, str(source), "train")
    shutil.rmtree(source / "Test")
    with pytest.raises(SourceError, match="no photos in Test"):
        pomona.load_images(spark, str(source), "Test")


def test_a_session_that_is_active_is_left_running(spark: Any, source: Path, tmp_path: Path) -> None:
    spark.conf.set("spark.sql.files.openCostInBytes", "12345")
    option = ExtractOptions(**{**QUICK.__dict__, "reader": "spark"})
    extract(source, tmp_path / "out", option, Cluster("local[1]"))
    assert spark.range(3).count() == 3
    assert spark.conf.get("spark.sql.files.openCostInBytes") == "12345"
    spark.conf.unset("spark.sql.files.openCostInBytes")


def test_slots_and_tasks(spark: Any) -> None:
    assert slots(spark) == 2
    assert photos_per_task(1, 2, 512) == 8
    assert photos_per_task(10**9, 1000, 512) == 20_000


def test_an_unfinished_extract_shows_in_status(extracted: Extracted, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing of Pomona's"):
        (tmp_path / "empty").mkdir()
        status(tmp_path / "empty")
    source, out = extracted
    reduce(out, FEW)
    assert status(out)["finished"] == ["extract", "reduce"]
    (source / "Training" / "Fruit 0" / "new.jpg").write_bytes(photo(4))
    extract(source, out, QUICK)
    assert status(out)["finished"] == ["extract"]
    assert json.loads(json.dumps(status(out)))["running"] is False
