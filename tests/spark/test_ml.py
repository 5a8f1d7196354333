"""Spark ML and DataFrames: the transformer, saved pipelines, `predict_images`."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.feature import PCA, StandardScaler, StringIndexer, VectorSlicer
from pyspark.ml.linalg import Vectors
from pyspark.sql import DataFrame, functions

import pomona
from pomona.backbone import weights
from pomona.backbone.extract import extract
from pomona.backbone.spec import make_spec
from pomona.core.errors import MismatchError, RequestError, WeightsError
from pomona.model import artifact
from pomona.model.recogniser import ANSWERS, make_recogniser, recognise
from pomona.photos.synthetic import synthesize
from pomona.spark import dataframes
from pomona.spark.dataframes import AddColumns
from pomona.spark.ml import MobileNetV2Features
from tests.conftest import fill, photo
from tests.object_stores import upload
from tests.small_model import ABOUT, SIZE, small_head

ROOT = Path(__file__).resolve().parents[2]
SPEC = make_spec(weights.load_weights("fruits"), image_size=32, device="cpu")
GOOD = [photo(n) for n in range(9)]
MIXED = [*GOOD, b"", GOOD[0][:200], None]
CODES = [*[None] * 9, "empty", "truncated", "unreadable"]


def stage(**given: Any) -> MobileNetV2Features:
    return MobileNetV2Features(**{"weights": "fruits", "imageSize": 32, "device": "cpu", **given})


def frame(spark: Any, contents: Sequence[bytes | None]) -> DataFrame:
    rows = [(n, content, n % 3) for n, content in enumerate(contents)]
    return spark.createDataFrame(rows, "id int, content binary, label int")


def wanted(contents: Sequence[bytes | None]) -> list[list[float] | None]:
    batch = pa.record_batch({"content": pa.array(contents, pa.binary())})
    return list(next(extract(iter([batch]), SPEC))["features"].to_pylist())


def by_id(found: DataFrame, column: str = "features") -> list[Any]:
    return [row[column] for row in sorted(found.collect(), key=lambda row: row["id"])]


# --- transform ---------------------------------------------------------------------------------


def test_arrays_are_those_of_extract(spark: Any) -> None:
    found = stage(vector=False).transform(frame(spark, MIXED))
    assert found.columns == ["id", "content", "label", "features", "error"]
    assert found.schema["features"].dataType.simpleString() == "array<float>"
    assert by_id(found) == wanted(MIXED)
    assert by_id(found, "error") == CODES
    assert by_id(found, "content") == MIXED


def test_vectors_keep_nulls_and_tell_their_width(spark: Any) -> None:
    found = stage().transform(frame(spark, MIXED))
    assert found.schema["features"].dataType.simpleString() == "vector"
    assert found.schema["features"].metadata["ml_attr"]["num_attrs"] == 1280
    for vector, values in zip(by_id(found), wanted(MIXED), strict=True):
        assert (vector is None) == (values is None)
        assert values is None or np.array_equal(vector.toArray().astype(np.float32), values)


def test_columns_of_any_name_and_type_stay(spark: Any) -> None:
    given = frame(spark, GOOD[:3]).select(
        functions.col("content").alias("bytes.of photo"),
        functions.lit(1).alias("twice"),
        functions.lit("x").alias("twice"),
        functions.lit("y").alias("width"),
        functions.lit(None).alias("nothing"),
        functions.create_map(functions.lit("a"), functions.array(functions.lit(1.5))).alias("map"),
        functions.to_timestamp(functions.lit("2026-11-24 12:00:00")).alias("at`"),
    )
    vectors = StringIndexer(inputCol="width", outputCol="indexed").fit(
        given.select("width").distinct()
    )
    row = (Vectors.dense([1.0, 2.0]), Vectors.sparse(3, {0: 1.0}))
    given = vectors.transform(given).crossJoin(spark.createDataFrame([row], ["v", "s"]))
    found = stage(inputCol="bytes.of photo", outputCol="a.b", errorCol="c d").transform(given)
    assert found.columns == [*given.columns, "a.b", "c d"]
    assert found.schema.fields[:-2] == given.schema.fields
    assert found.schema["indexed"].metadata == given.schema["indexed"].metadata != {}
    first, before = found.collect(), given.collect()
    assert [tuple(r)[:-2] for r in first] == [tuple(r) for r in before]
    assert all(r[-1] is None and r[-2].size == 1280 for r in first)


def test_empty_partitions_and_no_rows(spark: Any) -> None:
    few = frame(spark, GOOD[:2]).repartition(4)
    assert stage().transform(few).count() == 2
    none = stage(handleInvalid="skip").transform(few.where("id > 5"))
    assert none.count() == 0
    assert none.columns[-2:] == ["features", "error"]


@pytest.mark.parametrize("rows", [0, 1, 8, 9])
def test_a_worker_sees_few_rows_at_a_time(rows: int) -> None:
    seen: list[int] = []

    def work(batches: Any) -> Any:
        for batch in batches:
            seen.append(batch.num_rows)
            yield batch.append_column("made", batch["0"])

    on_worker = AddColumns(work, 0, False, 8, ("content", "out"), ("made",))
    given = pa.record_batch({"content": pa.array([b"x"] * rows, pa.binary())})
    found = list(on_worker(iter([given, given])))
    assert sum(batch.num_rows for batch in found) == 2 * rows == sum(seen)
    assert max(seen, default=0) <= 8
    assert all(batch.schema.names == ["content", "out"] for batch in found)


def test_a_spark_without_a_limit_is_told(
    spark: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING, "pomona"):
        stage().transform(frame(spark, GOOD[:1]))
        assert not caplog.records
        monkeypatch.setattr(dataframes, "BYTES", "spark.sql.a.setting.that.isnt.there")
        stage().transform(frame(spark, GOOD[:1]))
        stage(inputCol="path").transform(spark.createDataFrame([("a.jpg",)], "path string"))
    (record,) = caplog.records
    assert "maxRecordsPerBatch to 64" in record.getMessage()


def test_handle_invalid(spark: Any) -> None:
    given = frame(spark, MIXED)
    skipped = stage(handleInvalid="skip").transform(given)
    assert by_id(skipped, "id") == list(range(9))
    with pytest.raises(Exception, match="RequestError: a photo can't be used: empty"):
        stage(handleInvalid="error").transform(given).collect()
    assert stage(handleInvalid="error").transform(given.where("id < 9")).count() == 9


def test_paths_and_uris(spark: Any, tmp_path: Path, store: str) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "100%.jpg").write_bytes(GOOD[0])
    upload(store, "photo-uris", {"é/1.jpg": GOOD[1]})
    local = str(tmp_path / "a b" / "100%.jpg")
    paths = [
        local,
        (tmp_path / "a b" / "100%.jpg").as_uri(),
        f"s3://photo-uris/é/1.jpg?{store}",
        None,
        local + "x",
        f"s3://photo-uris/none.jpg?{store}",
        "dbfs:/photos/1.jpg",
        "a\0b.jpg",
        "s3://",
        "",
    ]
    given = spark.createDataFrame(list(enumerate(paths)), "id int, Where string")
    found = stage(inputCol="where", vector=False).transform(given)
    assert by_id(found)[:3] == wanted([GOOD[0], GOOD[0], GOOD[1]])
    assert by_id(found, "error") == [None] * 3 + ["unreadable"] * 7
    with pytest.raises(Exception, match=r"RequestError: None can't be used: unreadable"):
        stage(inputCol="where", handleInvalid="error").transform(given.where("id = 3")).collect()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"inputCol": "photo"}, "has no column photo; its columns: id, content, label"),
        ({"inputCol": "id"}, "column id holds integer; photos are bytes"),
        ({"outputCol": "Label"}, "has a column Label already"),
        ({"errorCol": "features"}, "has a column features already"),
        ({"handleInvalid": "drop"}, "handleInvalid is keep, skip, error, not drop"),
        ({"imageSize": 8}, "32 to 1024"),
        ({"weights": "nowhere.safetensors"}, "no weights at nowhere.safetensors"),
    ],
)
def test_what_is_refused(spark: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        stage(**given).transform(frame(spark, GOOD[:1]))


def test_params() -> None:
    made = stage()
    with pytest.raises(RequestError, match="no param size; there are inputCol"):
        made.setParams(size=3)
    with pytest.raises(TypeError):
        made.setImageSize("large")  # type: ignore[arg-type]
    for name in (param.name for param in made.params):
        assert made.getParam(name).doc
        upper = name[0].upper() + name[1:]
        before = getattr(made, f"get{upper}")()
        value = before if before is not None else 4
        assert getattr(made, f"set{upper}")(value) is made
        assert getattr(made, f"get{upper}")() == value
    spec = made._spec()
    assert made._spec() is spec
    assert made.copy()._spec() is spec  # a copy doesn't read the weights again
    other = made.copy({made.imageSize: 64, made.weights: "random:1"})
    assert (other._spec().image_size, other._spec().weights) == (64, "random:1")
    assert made._spec() is spec


# --- one pipeline, saved and loaded ------------------------------------------------------------


@pytest.mark.slow
def test_a_pipeline_fits_is_saved_and_gives_the_same(spark: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes(weights.pack(weights.load_weights("random:7")))
    images = pomona.load_images(spark, str(fill(tmp_path / "photos", each=4)), "Training")
    empty = spark.createDataFrame([("x", b"", "Fruit 0", "x")], images.schema)
    images = images.unionByName(empty).coalesce(1)
    pipeline = Pipeline(
        stages=[
            StringIndexer(inputCol="label", outputCol="indexed"),
            stage(weights=str(file), handleInvalid="skip"),
            # Spark's PCA of all 1280 features takes half a minute of the JVM.
            VectorSlicer(inputCol="features", outputCol="few", indices=list(range(32))),
            StandardScaler(inputCol="few", outputCol="scaled", withMean=True),
            PCA(k=3, inputCol="scaled", outputCol="pca_features"),
            LogisticRegression(featuresCol="pca_features", labelCol="indexed", maxIter=3),
        ]
    )
    fitted = pipeline.fit(images)
    first = fitted.transform(images).select("path", "probability", "prediction").collect()
    assert len(first) == 12

    fitted.write().save(str(tmp_path / "saved"))
    fitted.write().overwrite().save(str(tmp_path / "saved"))
    file.unlink()
    assert str(tmp_path) not in _metadata(tmp_path / "saved")
    other = spark.newSession()
    loaded = PipelineModel.load(str(tmp_path / "saved"))
    assert loaded.stages[1].getWeights() == "mine.safetensors"
    again = pomona.load_images(other, str(tmp_path / "photos"), "Training")
    second = loaded.transform(again).select("path", "probability", "prediction").collect()
    assert sorted(first) == sorted(second)
    with pytest.raises(WeightsError, match="no weights at other"):
        loaded.stages[1].copy().setWeights("other").transform(again)


def _metadata(folder: Path) -> str:
    return "".join(file.read_text() for file in folder.rglob("metadata/part-*"))


@pytest.fixture
def saved(spark: Any, tmp_path: Path) -> Path:
    stage(imageSize=64, vector=False).save(str(tmp_path / "stage"))
    return tmp_path / "stage"


def test_a_saved_stage_is_plain_files(saved: Path, tmp_path: Path) -> None:
    loaded = MobileNetV2Features.load(str(saved))
    assert (loaded.getImageSize(), loaded.getVector(), loaded.getBatchSize()) == (64, False, None)
    assert loaded.uid in _metadata(saved)
    (row,) = pq.read_table(saved / "weights").to_pylist()
    file = tmp_path / "again.safetensors"
    file.write_bytes(row["content"])
    assert row["kind"] == "safetensors"
    assert weights.load_weights(str(file)).digest == loaded._weights().digest


def test_onnx_weights_are_saved_too(spark: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.onnx"
    file.write_bytes(SPEC.payload)
    stage(weights=str(file)).save(str(tmp_path / "stage"))
    file.unlink()
    loaded = MobileNetV2Features.load(str(tmp_path / "stage")).setVector(False)
    assert by_id(loaded.transform(frame(spark, GOOD[:2]))) == wanted(GOOD[:2])


def test_changed_weights_are_refused(spark: Any, saved: Path) -> None:
    (file,) = (saved / "weights").glob("*.parquet")
    table = pq.read_table(file)
    (row,) = table.to_pylist()
    for change in (b"\0" + row["content"][1:], row["content"][:-4] + b"\0\0\0\1"):
        pq.write_table(pa.table({"kind": ["safetensors"], "content": [change]}), file)
        file.with_name(f".{file.name}.crc").unlink(missing_ok=True)
        with pytest.raises(WeightsError, match="were changed or damaged: their digest"):
            MobileNetV2Features.load(str(saved))
    file.unlink()
    with pytest.raises(MismatchError, match="can't be read: copy the whole folder"):
        MobileNetV2Features.load(str(saved))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"format":1', '"format":2', "has format 2, and this Pomona reads up to 1"),
        ("spark.ml.MobileNetV2F", "spark.ml.Other", "holds pomona.spark.ml.Othereatures, not"),
    ],
)
def test_what_else_is_refused(saved: Path, old: str, new: str, said: str) -> None:
    (file,) = (saved / "metadata").glob("part-*")
    file.write_text(file.read_text().replace(old, new))
    file.with_name(f".{file.name}.crc").unlink()
    with pytest.raises(MismatchError, match=said):
        MobileNetV2Features.load(str(saved))


# --- answers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(features: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "model"
    spec = make_spec(weights.load_weights("fruits"), image_size=SIZE, device="cpu")
    artifact.save_model(folder, spec.payload, small_head(features), ABOUT)
    return folder


def test_answers_beside_images(spark: Any, trained: Path, tmp_path: Path) -> None:
    source = fill(tmp_path / "photos", each=3)
    (source / "Test" / "Fruit 0" / "bad.jpg").write_bytes(b"no photo")
    images = pomona.load_images(spark, str(source), "Test")
    found = pomona.predict_images(images, artifact.PACKAGED, top=2)
    assert found.columns == [*images.columns, *[f"predicted_{n}" for n in ANSWERS.names]]
    rows = {row["path"]: row.asDict() for row in found.collect()}
    assert len(rows) == 10
    assert rows["Test/Fruit 0/bad.jpg"]["predicted_error"] == "not_an_image"
    assert rows["Test/Fruit 0/bad.jpg"]["predicted_label"] is None

    recogniser = make_recogniser(artifact.load_model(artifact.PACKAGED), 2)
    paths = sorted(rows)
    contents = pa.array([(source / path).read_bytes() for path in paths], pa.binary())
    batch = pa.record_batch({"content": contents})
    for path, answer in zip(
        paths, next(recognise(iter([batch]), recogniser)).to_pylist(), strict=True
    ):
        assert {name: rows[path][f"predicted_{name}"] for name in answer} == answer


def test_answers_beside_paths(spark: Any, tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(GOOD[0])
    paths = spark.createDataFrame([(str(tmp_path / "1.jpg"),), ("gone.jpg",)], ["path"])
    found = pomona.predict_images(paths, artifact.load_model(artifact.PACKAGED), prefix="")
    assert found.columns == ["path", *ANSWERS.names]
    one, other = sorted(found.collect(), key=lambda row: row["path"])
    assert (len(one["probabilities"]), one["error"]) == (3, None)
    assert (other["probabilities"], other["error"]) == (None, "unreadable")
    with pytest.raises(RequestError, match="has a column label already"):
        pomona.predict_images(found, artifact.PACKAGED, column="path", prefix="")
    with pytest.raises(RequestError, match="there is no model in"):
        pomona.predict_images(paths, tmp_path)


# --- the page ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_python_blocks_of_the_page_run(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the tests' session, whose JVM has another working folder: its path is absolute here."""
    pytest.importorskip("sklearn")
    synthesize(tmp_path / "photos", classes=3, images=36, workers=1)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "spark.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.S))
    whole = code.replace('"pipeline"', repr(str(tmp_path / "pipeline")))
    assert whole != code
    scope: dict[str, Any] = {}
    exec(whole, scope)
    assert "|prediction|" in capsys.readouterr().out
    assert scope["answers"].count() == scope["test"].count() > 0
