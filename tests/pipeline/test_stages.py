"""The stages on a running Spark session, and what other programs read of them."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from pomona.core.errors import BusyError, JobError, MismatchError, RequestError, SourceError
from pomona.core.files import read_json, write_json
from pomona.core.progress import Tick
from pomona.model.projection import load_projection
from pomona.pipeline.extract import ExtractOptions, extract, photos_per_task, rejected_share
from pomona.pipeline.reduce import ReduceOptions, reduce
from pomona.pipeline.run import run
from pomona.pipeline.status import status
from pomona.spark import tasks
from pomona.spark.resources import slots
from pomona.spark.session import Cluster, check_java
from pomona.workspace import layout
from tests.conftest import fill, photo

pytestmark = pytest.mark.usefixtures("spark")

QUICK = ExtractOptions(weights="fruits", image_size=32, device="cpu")
FEW = ReduceOptions(components=5)


def rows(out: Path) -> list[dict[str, Any]]:
    found = [
        {**row, "split": file.parent.name.split("=")[1]}
        for file in sorted((out / "features").glob("split=*/*.parquet"))
        for row in pq.ParquetFile(file).read().to_pylist()
    ]
    return sorted(found, key=lambda row: str(row["path"]))


def outputs(out: Path) -> dict[str, Any]:
    return {
        name: {k: v for k, v in record.items() if k != "times"}
        for name, record in read_json(out / "manifest.json")["stages"].items()
    }


# --- extract -----------------------------------------------------------------------------------


def test_every_photo_has_a_row(source: Path, tmp_path: Path) -> None:
    ticks: list[Tick] = []
    record = extract(source, tmp_path / "out", QUICK, on_tick=ticks.append)
    found = rows(tmp_path / "out")
    assert len(found) == record["photos"] == record["times"]["computed"] == 48
    assert record["splits"] == {"Training": 24, "Test": 24}
    assert {row["label"] for row in found} == {"Fruit 0", "Fruit 1", "Fruit 2"}
    assert all(len(row["features"]) == 1280 for row in found)
    assert {(row["width"], row["height"]) for row in found} == {(100, 100)}
    one = source / found[0]["path"]
    assert found[0]["size"] == one.stat().st_size
    assert abs(found[0]["modified"].timestamp() - one.stat().st_mtime) < 0.002
    assert (ticks[-1].stage, ticks[0].stage) == ("table", "list")
    assert max(t.done for t in ticks if t.stage == "extract") == 48
    assert not (tmp_path / "out" / "_work").exists()


def test_spark_and_a_direct_call_agree(source: Path, tmp_path: Path) -> None:
    from pomona import MobileNetV2Extractor

    extract(source, tmp_path / "out", QUICK)
    extractor = MobileNetV2Extractor("cpu", weights="fruits", image_size=32)
    found = rows(tmp_path / "out")
    direct = extractor.extract_batch([(source / row["path"]).read_bytes() for row in found])
    table = np.array([row["features"] for row in found], np.float32)
    assert np.abs(direct - table).max() <= 1e-5


def test_two_identical_runs_differ_only_in_times(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(source, tmp_path / name, QUICK, FEW)
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two")


def test_only_what_is_new_is_computed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(source, out, QUICK)
    before = rows(out)
    assert extract(source, out, QUICK)["times"]["computed"] == 0
    assert rows(out) == before
    (source / "Training/Fruit 0/new.jpg").write_bytes(photo(77))
    (source / "Training/Fruit 9").mkdir()
    (source / "Training/Fruit 9/1.png").write_bytes(photo(78, kind="PNG"))
    assert extract(source, out, QUICK)["times"]["computed"] == 2
    assert len(rows(out)) == 50


def test_a_changed_photo_is_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(source, out, QUICK)
    path = "Training/Fruit 0/0_100.jpg"
    old = next(row for row in rows(out) if row["path"] == path)
    same_size = bytearray((source / path).read_bytes())
    (source / path).write_bytes(photo(991))
    os.utime(source / path, (1, 1_000_000_000))
    assert extract(source, out, QUICK)["times"]["computed"] == 1
    new = next(row for row in rows(out) if row["path"] == path)
    assert new["features"] != old["features"]
    (source / path).write_bytes(same_size)  # its time alone tells
    assert extract(source, out, QUICK)["times"]["computed"] == 1
    assert next(row for row in rows(out) if row["path"] == path)["features"] == old["features"]
    assert len(rows(out)) == 48


def test_deleted_photos_go_or_stay(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(source, out, QUICK)
    shutil.rmtree(source / "Training/Fruit 1")
    (source / "Test/Fruit 0/0_100.jpg").unlink()
    kept = ExtractOptions(**{**QUICK.__dict__, "keep_deleted": True})
    assert extract(source, out, kept)["photos"] == 48
    assert len(rows(out)) == 48
    record = extract(source, out, QUICK)
    assert record["photos"] == len(rows(out)) == 48 - 8 - 1
    assert record["times"]["computed"] == 0


def test_another_label_rule_computes_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for split in ("Training", "Test"):
        (source / split / "Kind").mkdir()
        (source / split / "Fruit 0").rename(source / split / "Kind" / "Fruit 0")
    extract(source, out, QUICK)
    top = ExtractOptions(**{**QUICK.__dict__, "label": "top"})
    assert extract(source, out, top)["times"]["computed"] == 0
    labels = {row["path"]: row["label"] for row in rows(out)}
    assert labels["Training/Kind/Fruit 0/0_100.jpg"] == "Kind"


def test_a_test_fraction_splits(tmp_path: Path) -> None:
    source = tmp_path / "flat"
    shutil.copytree(fill(tmp_path / "s", each=20) / "Training", source)
    split = ExtractOptions(**{**QUICK.__dict__, "test_fraction": 0.3})
    record = extract(source, tmp_path / "out", split)
    assert record["splits"]["Training"] + record["splits"]["Test"] == 60
    assert 8 <= record["splits"]["Test"] <= 30
    assert {row["split"] for row in rows(tmp_path / "out")} == {"Training", "Test"}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"weights": "random:1"}, "weights_digest"),
        ({"image_size": 64}, "preprocessing size 32"),
        ({"backend": "torch"}, "backend"),
    ],
)
def test_other_settings_are_refused(
    source: Path, tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    if "backend" in change:
        pytest.importorskip("torch")
    out = tmp_path / "out"
    extract(source, out, QUICK)
    before = rows(out)
    with pytest.raises(MismatchError, match=rf"{key}.*another --out"):
        extract(source, out, ExtractOptions(**{**QUICK.__dict__, **change}))
    assert rows(out) == before


def test_another_source_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(source, out, QUICK)
    moved = tmp_path / "elsewhere"
    source.rename(moved)
    with pytest.raises(MismatchError, match="--source-moved"):
        extract(moved, out, QUICK)
    option = ExtractOptions(**{**QUICK.__dict__, "source_moved": True})
    assert extract(moved, out, option)["times"]["computed"] == 0


def test_a_busy_out_is_refused(source: Path, tmp_path: Path) -> None:
    out = layout.open_out(tmp_path / "out")
    with layout.lock(out), pytest.raises(BusyError):
        extract(source, out.root, QUICK)


def test_no_photos_and_an_out_inside(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(SourceError, match=r"holds no photos \(1 other files\)"):
        extract(tmp_path / "empty", tmp_path / "out", QUICK)
    with pytest.raises(SourceError, match="does not exist"):
        extract(tmp_path / "nowhere", tmp_path / "out", QUICK)
    with pytest.raises(RequestError, match="source lies inside"):
        extract(source, source.parent, QUICK)
    spark_reads = ExtractOptions(**{**QUICK.__dict__, "reader": "spark"})
    with pytest.raises(RequestError, match="inside the source"):
        extract(source, source / "out", spark_reads)
    mine = tmp_path / "project" / "projection"
    mine.mkdir(parents=True)
    with pytest.raises(RequestError, match="isn't Pomona's"):
        extract(source, mine.parent, QUICK)
    for inside in (source, source / "out", source / "Training" / ".." / "o"):
        with pytest.raises(RequestError, match="inside the source"):
            extract(source, inside, QUICK)


def test_bad_photos_are_rows_and_are_counted(source: Path, tmp_path: Path) -> None:
    folder = source / "Training" / "Fruit 0"
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    (folder / "cut.jpg").write_bytes(photo(5)[:900])
    (folder / "dangling.jpg").symlink_to(folder / "nowhere")
    (folder / "folder.jpg").mkdir()
    record = extract(source, tmp_path / "out", QUICK)
    wanted = {"empty": 1, "not_an_image": 1, "truncated": 1, "unreadable": 2}
    assert record["rejected"] == wanted
    assert record["photos"] == len(rows(tmp_path / "out")) == 53
    with (tmp_path / "out" / "rejected.csv").open(newline="") as file:
        rejected = list(csv.DictReader(file))
    assert {row["path"].rsplit("/", 1)[1]: row["error"] for row in rejected} == {
        "empty.jpg": "empty",
        "text.jpg": "not_an_image",
        "cut.jpg": "truncated",
        "dangling.jpg": "unreadable",
        "folder.jpg": "unreadable",
    }
    assert rejected[0].keys() == {"path", "split", "label", "error"}
    found = status(tmp_path / "out")
    assert found["rejected"] == wanted
    assert (found["photos"], found["done"], found["todo"]) == (53, 53, 0)
    assert rejected_share(record) == pytest.approx(5 / 53)


def test_what_was_unreadable_is_tried_again(source: Path, tmp_path: Path) -> None:
    link = source / "Training" / "Fruit 0" / "later.jpg"
    link.symlink_to(tmp_path / "later.jpg")
    out = tmp_path / "out"
    assert extract(source, out, QUICK)["rejected"] == {"unreadable": 1}
    digest = outputs(out)["extract"]["digests"]["features"]
    assert extract(source, out, QUICK)["rejected"] == {"unreadable": 1}
    assert outputs(out)["extract"]["digests"]["features"] == digest
    (tmp_path / "later.jpg").write_bytes(photo(3))
    assert extract(source, out, QUICK)["rejected"] == {}


def test_binary_file_gives_the_same_table(tmp_path: Path) -> None:
    """A local folder read as Hadoop's URIs are, and as local folders are."""
    source = fill(tmp_path / "source [1] {x}")
    for name in ("a b.jpg", "été.JPG", "50%20off.jpeg", "k=v.Png", "#1.jpg", "it's.jpg", "🍎.jpg"):
        folder = source / "Training" / f"L {name}"
        folder.mkdir()
        (folder / name).write_bytes(photo(len(name)))
    (source / "Training" / "Fruit 0" / "cut.jpg").write_bytes(photo(1)[:700])
    (source / "Training" / "Fruit 0" / "empty.jpg").write_bytes(b"")
    (source / "Training" / "Fruit 0" / "notes.txt").write_text("x")
    extract(source, tmp_path / "one", QUICK)
    spark_reads = ExtractOptions(**{**QUICK.__dict__, "reader": "spark"})
    record = extract(source, tmp_path / "two", spark_reads)
    assert rows(tmp_path / "one") == rows(tmp_path / "two")
    assert record["photos"] == 48 + 7 + 2
    assert extract(source, tmp_path / "two", spark_reads)["times"]["computed"] == 0
    (source / "Training" / "Fruit 0" / "new.jpg").write_bytes(photo(9))
    assert extract(source, tmp_path / "two", spark_reads)["times"]["computed"] == 1


def test_what_vanishes_from_hadoop_is_unreadable(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pomona.spark import binary_files

    listed = binary_files.list_hadoop

    def then_gone(*given: Any) -> Any:
        found = listed(*given)
        (source / "Training/Fruit 0/3_100.jpg").unlink()
        return found

    monkeypatch.setattr(binary_files, "list_hadoop", then_gone)
    options = ExtractOptions(**{**QUICK.__dict__, "reader": "spark"})
    record = extract(source, tmp_path / "out", options)
    assert record["rejected"] == {"unreadable": 1}
    assert record["photos"] == len(rows(tmp_path / "out")) == 48


def test_binary_file_doesnt_make_a_partition_of_each_photo(spark: Any, source: Path) -> None:
    from pomona.pipeline.extract_hadoop import PARTITION_BYTES, _conf
    from pomona.spark import binary_files

    per_task = 16
    settings = {
        "spark.sql.files.openCostInBytes": str(PARTITION_BYTES // per_task),
        "spark.sql.files.maxPartitionBytes": str(PARTITION_BYTES),
        "spark.sql.files.minPartitionNum": "2",
    }
    with _conf(spark, settings):
        frame = binary_files.binary_files(spark, str(source))
        count = len(frame.select("path").mapInArrow(_partition_names, "n int").distinct().collect())
    assert 2 <= count <= 5


def _partition_names(batches: Any) -> Any:
    import pyarrow as pa

    from pomona.spark.tasks import partition

    for _ in batches:
        yield pa.RecordBatch.from_pydict({"n": pa.array([partition()], pa.int32())})


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


# --- reduce ------------------------------------------------------------------------------------


def test_outputs_of_reduce(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (source / "Training" / "Fruit 0" / "bad.jpg").write_bytes(b"")
    records = run(source, out, QUICK, FEW)
    record = records["reduce"]
    assert record["rows"] == {"training_pca": 24, "test_pca": 24}
    assert record["photos_fitted"] == 24
    assert record["compression_ratio"] == 256
    projection = load_projection(out / "projection")
    table = [row for row in rows(out) if row["features"]]
    wanted = {
        row["path"]: projection.transform(np.array([row["features"]], np.float32))[0]
        for row in table
    }
    for name in ("training_pca", "test_pca"):
        files = list((out / name).glob("label=*/*.parquet"))
        assert len(files) == 3  # one for each label
        frame = pd.read_parquet(out / name)
        assert set(frame.columns) == {"path", "filename", "pca_features", "label"}
        for path, values in zip(frame["path"], frame["pca_features"], strict=True):
            np.testing.assert_allclose(values, wanted[path], atol=1e-4)
        text = pd.read_csv(next((out / f"{name}_csv").glob("*.csv")))
        assert list(text.columns) == ["label", "filename", *[f"f_{n}" for n in range(5)]]
        assert len(text) == 24
    assert (out / "report" / "pca_variance.png").stat().st_size > 10_000


def test_scores_centre_on_training(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", QUICK, FEW)
    frame = pd.read_parquet(tmp_path / "out" / "training_pca")
    scores = np.stack(list(frame["pca_features"])).astype(np.float64)
    assert np.abs(scores.mean(axis=0)).max() < 1e-4 * np.abs(scores).max()
    covariance = np.cov(scores.T)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-4 * covariance.max()


def test_reduce_again_does_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(source, out, QUICK, FEW)["reduce"]
    stamp = (out / "projection" / "projection.json").stat().st_mtime_ns
    assert reduce(out, FEW) == first
    assert (out / "projection" / "projection.json").stat().st_mtime_ns == stamp
    old = read_json(out / "manifest.json")
    reduce(out, ReduceOptions(components=6, plots=False))
    assert not (out / "report" / "pca_variance.png").exists()  # of another projection
    write_json(out / "manifest.json", old)  # as if killed before the manifest
    assert reduce(out, FEW)["components"] == 5
    assert load_projection(out / "projection").k == 5
    other = reduce(out, ReduceOptions(components=0.8, whiten=True))
    assert other["components"] != 5
    assert other["variance_kept"] >= 0.8


def test_reduce_refuses_what_it_cant(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RequestError, match="pomona extract"):
        reduce(out, FEW)
    extract(source, out, QUICK)
    with pytest.raises(RequestError, match="23 at most"):
        reduce(out, ReduceOptions(components=24))
    write_json(out / "_work" / "plan.json", {"photos": 99, "before": 48, "run": "x"})
    with pytest.raises(RequestError, match="isn't finished"):
        reduce(out, FEW)
    assert status(out)["todo"] == 99 - 48


def test_only_test_photos(tmp_path: Path) -> None:
    source = fill(tmp_path / "s")
    shutil.rmtree(source / "Training")
    extract(source, tmp_path / "out", QUICK)
    with pytest.raises(RequestError, match="at least 2 Training photos"):
        reduce(tmp_path / "out", FEW)


# --- other programs ----------------------------------------------------------------------------

NAMES = [
    "a b",
    "été",
    "50%20off",
    "k=v",
    "#1",
    'it\'s "q"',
    "🍎",
    "c,d;e",
    "x:y*?",
    "[z]{w}",
    "007",
]


def test_names_go_through_parquet_and_csv(spark: Any, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    for number, name in enumerate(NAMES):
        folder = source / "Training" / name
        folder.mkdir(parents=True)
        for copy in range(2):
            (folder / f"{name}{copy}.jpg").write_bytes(photo(10 * number + copy))
    (source / "Training" / "loose.jpg").write_bytes(photo(999))
    run(source, out, QUICK, FEW)
    wanted = [
        *sorted((f"{n}{c}.jpg", n) for n in NAMES for c in range(2)),
        ("loose.jpg", "Training"),
    ]

    def same(found: list[tuple[str, Any]]) -> None:
        assert sorted(found) == sorted(wanted)

    assert {row["path"] for row in rows(out)} == {
        f"Training/{name}" if label == "Training" else f"Training/{label}/{name}"
        for name, label in wanted
    }
    frame = pd.read_parquet(out / "training_pca")
    same(list(zip(frame["filename"], frame["label"].astype(str), strict=True)))
    options = "hive_partitioning=true, hive_types_autocast=false"
    query = f"select filename, label from read_parquet(?, {options})"
    same(duckdb.execute(query, [f"{out}/training_pca/*/*.parquet"]).fetchall())
    read = spark.read.schema(
        "path string, filename string, pca_features array<float>, label string"
    )
    found = read.parquet(str(out / "training_pca")).select("filename", "label").collect()
    same([tuple(row) for row in found])
    with next((out / "training_pca_csv").glob("*.csv")).open(newline="", encoding="utf-8") as file:
        same([(row["filename"], row["label"]) for row in csv.DictReader(file)])


def test_pandas_duckdb_and_spark_read_the_features(
    spark: Any, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    extract(source, out, QUICK)
    frame = pd.read_parquet(out / "features")
    assert len(frame) == 48
    assert set(frame["split"].astype(str)) == {"Training", "Test"}
    count = duckdb.execute(
        "select count(*), count(distinct path), min(len(features)), max(len(features)) "
        "from read_parquet(?, hive_partitioning=true) where error is null",
        [f"{out}/features/*/*.parquet"],
    ).fetchone()
    assert count == (48, 48, 1280, 1280)
    read = spark.read.parquet(str(out / "features"))
    assert read.count() == 48
    assert read.schema["features"].dataType.simpleString() == "array<float>"
    assert read.schema["modified"].dataType.simpleString() == "timestamp"


def test_output_files_follow_rows_not_tasks(source: Path, tmp_path: Path) -> None:
    extract(source, tmp_path / "out", QUICK)  # 6 tasks
    assert len(list((tmp_path / "out" / "features").glob("split=*/*.parquet"))) == 2


def test_spark_ml_agrees(spark: Any, source: Path, tmp_path: Path) -> None:
    """Spark ML's StandardScaler divides by n − 1, and so do we."""
    from pyspark.ml.feature import PCA, StandardScaler
    from pyspark.ml.functions import array_to_vector

    out = tmp_path / "out"
    run(source, out, QUICK, replace(FEW, power=1.0))
    table = spark.read.parquet(str(out / "features")).where("split = 'Training'")
    table = table.select("path", array_to_vector("features").alias("x"))
    scaler = StandardScaler(inputCol="x", outputCol="s", withMean=True, withStd=True).fit(table)
    scaled = scaler.transform(table)
    pca = PCA(k=5, inputCol="s", outputCol="p").fit(scaled)
    ours = load_projection(out / "projection")
    theirs = np.array(pca.explainedVariance)
    np.testing.assert_allclose(ours.explained_variance_ratio[:5], theirs, rtol=1e-8)
    frame = pd.read_parquet(out / "training_pca").set_index("path")
    found = {row["path"]: row["p"].toArray() for row in pca.transform(scaled).collect()}
    wanted = np.stack([found[path] for path in frame.index])
    scores = np.stack(list(frame["pca_features"])).astype(np.float64)
    scores *= np.sign((scores * wanted).sum(axis=0))
    assert np.abs(scores - wanted).max() <= 1e-5 * np.ptp(wanted)


# --- notebooks ---------------------------------------------------------------------------------


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
    assert photos_per_task(1, 2) == 8
    assert photos_per_task(10**9, 1000) == 20_000


def test_an_unfinished_extract_shows_in_status(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing of Pomona's"):
        (tmp_path / "out").mkdir()
        status(tmp_path / "out")
    run(source, tmp_path / "o", QUICK, FEW)
    assert status(tmp_path / "o")["finished"] == ["extract", "reduce"]
    (source / "Training" / "Fruit 0" / "new.jpg").write_bytes(photo(4))
    extract(source, tmp_path / "o", QUICK)
    assert status(tmp_path / "o")["finished"] == ["extract"]
    assert json.loads(json.dumps(status(tmp_path / "o")))["running"] is False
