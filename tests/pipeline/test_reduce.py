"""The stage reduce, and what other programs read of its tables and of the features."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest

from pomona.core.errors import RequestError
from pomona.core.files import read_json, write_json
from pomona.model.projection import load_projection
from pomona.pipeline.extract import extract
from pomona.pipeline.reduce import ReduceOptions, reduce
from pomona.pipeline.run import run
from pomona.pipeline.status import status
from tests.conftest import fill, photo
from tests.pipeline.conftest import FRUITS as QUICK
from tests.pipeline.conftest import Extracted, rows

FEW = ReduceOptions(components=5)


def test_outputs_of_reduce(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (source / "Training" / "Fruit 0" / "bad.jpg").write_bytes(b"")
    records = run(source, out, QUICK, FEW, train_options=None)
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
    run(source, tmp_path / "out", QUICK, FEW, train_options=None)
    frame = pd.read_parquet(tmp_path / "out" / "training_pca")
    scores = np.stack(list(frame["pca_features"])).astype(np.float64)
    assert np.abs(scores.mean(axis=0)).max() < 1e-4 * np.abs(scores).max()
    covariance = np.cov(scores.T)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-4 * covariance.max()


def test_reduce_again_does_nothing(extracted: Extracted) -> None:
    _, out = extracted
    first = reduce(out, FEW)
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


def test_reduce_refuses_what_it_cant(extracted: Extracted, tmp_path: Path) -> None:
    _, out = extracted
    with pytest.raises(RequestError, match="pomona extract"):
        reduce(tmp_path / "nothing", FEW)
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
    run(source, out, QUICK, FEW, train_options=None)
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


def test_csv_holds_no_commands(tmp_path: Path) -> None:
    """Of a terminal: always; of a spreadsheet: with ``csv_safe``."""
    source, out = tmp_path / "source", tmp_path / "out"
    strange = {"=1+1": "=1+1", "a\n\x1b[2Jb": r"a\n\x1b[2Jb", "plain": "plain"}
    for number, name in enumerate(strange):
        folder = source / "Training" / name
        folder.mkdir(parents=True)
        for copy in range(2):
            (folder / f"{copy}.jpg").write_bytes(photo(10 * number + copy))
        (folder / "@bad.jpg").write_bytes(b"")
    few = ReduceOptions(components=2, plots=False)
    for safe in (False, True):
        options = replace(QUICK, csv_safe=safe), replace(few, csv_safe=safe)
        run(source, out, *options, train_options=None)
        prefix = "'" if safe else ""
        wanted = {shown.replace("=1", f"{prefix}=1") for shown in strange.values()}
        text = next((out / "training_pca_csv").glob("*.csv")).read_text(encoding="utf-8")
        assert {row["label"] for row in csv.DictReader(text.splitlines())} == wanted
        rejected = out.joinpath("rejected.csv").read_text(encoding="utf-8")
        assert {row["label"] for row in csv.DictReader(rejected.splitlines())} == wanted
        assert set(pd.read_parquet(out / "training_pca")["label"].astype(str)) == set(strange)


def test_pandas_duckdb_and_spark_read_the_features(spark: Any, extracted: Extracted) -> None:
    _, out = extracted
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


def test_output_files_follow_rows_not_tasks(extracted: Extracted) -> None:
    _, out = extracted  # from 6 tasks
    assert len(list((out / "features").glob("split=*/*.parquet"))) == 2


def test_spark_ml_agrees(spark: Any, extracted: Extracted) -> None:
    """Spark ML's StandardScaler divides by n − 1, and so do we."""
    from pyspark.ml.feature import PCA, StandardScaler
    from pyspark.ml.functions import array_to_vector

    _, out = extracted
    reduce(out, replace(FEW, power=1.0))
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
