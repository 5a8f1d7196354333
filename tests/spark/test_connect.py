"""Over Spark Connect, in a process of its own: it doesn't mix with classic sessions."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pomona.core.errors import MissingError, RequestError
from pomona.model.artifact import PACKAGED, load_model
from pomona.model.recogniser import make_recogniser, recognise
from pomona.pipeline.extract import ExtractOptions, extract
from pomona.pipeline.reduce import ReduceOptions
from pomona.pipeline.run import run
from pomona.spark import connect
from tests.conftest import fill

pytest.importorskip("grpc", reason="pip install 'pomona[connect]'")

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ExtractOptions(weights="fruits", image_size=64, device="cpu")
FEW = ReduceOptions(components=5, plots=False)


def over_connect(address: str, source: str, work: str, saved: str) -> dict[str, Any]:
    """Run in the client's process, and return what the test compares."""
    from pyspark.ml import PipelineModel
    from pyspark.sql import SparkSession

    import pomona
    from pomona.spark.ml import MobileNetV2Features

    spark = SparkSession.builder.remote(address).getOrCreate()
    results: dict[str, Any] = {"session": type(spark).__module__}

    records = run(source, f"{work}/out", OPTIONS, FEW, train_options=None)
    results["features"] = records["extract"]["digests"]["features"]
    results["rows"] = records["reduce"]["rows"]

    images = pomona.load_images(spark, source, "Test")
    answers = pomona.predict_images(images, PACKAGED, top=2).drop("content")
    results["answers"] = [row.asDict() for row in answers.collect()]

    pipeline = PipelineModel.load(saved)
    results["vectors"] = vectors(pipeline.transform(images))
    for _ in range(2):
        pipeline.stages[0].write().overwrite().save(f"{work}/stage")
    loaded = MobileNetV2Features.load(f"{work}/stage")  # takes the weights' digest again
    results["uids"] = [loaded.uid, pipeline.stages[0].uid]

    spark.stop()
    return results


def vectors(frame: Any) -> dict[str, list[float]]:
    rows = frame.select("path", "scaled").collect()
    return {row["path"]: row["scaled"].toArray().tolist() for row in rows}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A Spark Connect server in a process of its own; gives its address."""
    import pyspark

    with socket.socket() as spare:
        spare.bind(("127.0.0.1", 0))
        port = spare.getsockname()[1]
    conf = {
        "spark.connect.grpc.binding.address": "127.0.0.1",
        "spark.connect.grpc.binding.port": port,
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.ui.enabled": "false",
        "spark.executorEnv.OMP_NUM_THREADS": "1",
    }
    settings = [word for key, value in conf.items() for word in ("--conf", f"{key}={value}")]
    submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
    main = "org.apache.spark.sql.connect.service.SparkConnectServer"
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [submit, "--master", "local[2]", "--class", main, *settings],
            env=clean() | {"PYSPARK_PYTHON": sys.executable},
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )
    try:
        for _ in range(3000):
            assert process.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
            with contextlib.suppress(RequestError):
                connect.check_server(f"sc://127.0.0.1:{port}")
                break
            time.sleep(0.2)
        yield f"sc://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def clean() -> dict[str, str]:
    """The environment without what the classic session of this process added."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("SPARK_", "PYSPARK_GATEWAY"))}


def run_python(*command: object) -> str:
    """Run Python and return its last line."""
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(
        words, cwd=ROOT, env=clean(), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_everything_over_connect(spark: Any, server: str, tmp_path: Path) -> None:
    from pyspark.ml import PipelineModel
    from pyspark.ml.feature import Normalizer

    import pomona

    source = fill(tmp_path / "source", each=10)
    classic = extract(source, tmp_path / "out", OPTIONS)
    images = pomona.load_images(spark, str(source), "Test")
    stage = pomona.MobileNetV2Features(weights="fruits", imageSize=32)
    pipeline = PipelineModel([stage, Normalizer(inputCol="features", outputCol="scaled")])
    pipeline.save(str(tmp_path / "saved"))

    places = [source, tmp_path / "work", tmp_path / "saved"]
    results = json.loads(run_python("-m", "tests.spark.test_connect", server, *places))
    assert results["session"] == "pyspark.sql.connect.session"
    assert results["features"] == classic["digests"]["features"]
    assert results["rows"] == {"training_pca": 30, "test_pca": 30}
    assert results["answers"] == answers(source)
    assert results["vectors"] == vectors(pipeline.transform(images))
    assert results["uids"] == [stage.uid] * 2

    options = ["--weights", "fruits", "--image-size", "64", "--device", "cpu", "--json"]
    out = ["--out", tmp_path / "by_address", "--master", f"{server}/;user_id=me"]
    records = json.loads(run_python("-m", "pomona", "extract", source, *out, *options))
    assert records["extract"]["digests"]["features"] == classic["digests"]["features"]


def answers(source: Path) -> list[dict[str, Any]]:
    """The same answers without Spark."""
    files = sorted(source.glob("Test/*/*.jpg"))
    contents = pa.array([file.read_bytes() for file in files], pa.binary())
    recogniser = make_recogniser(load_model(PACKAGED), 2)
    recognised = next(recognise(iter([pa.record_batch({"content": contents})]), recogniser))
    return [
        {
            "path": file.relative_to(source).as_posix(),
            "label": file.parent.name,
            "filename": file.name,
            **{f"predicted_{name}": value for name, value in row.items()},
        }
        for file, row in zip(files, recognised.to_pylist(), strict=True)
    ]


# --- the address -------------------------------------------------------------------------------


def test_nobody_answers() -> None:
    with socket.socket() as spare:
        spare.bind(("127.0.0.1", 0))  # bound, and nobody listens
        address = f"127.0.0.1:{spare.getsockname()[1]}"
        with pytest.raises(RequestError, match=f"no Spark Connect server answers at {address}"):
            connect.check_server(f"sc://{address}/;token=secret")


@pytest.mark.parametrize("address", ["sc://", "sc://:15002", "sc://host:port", "sc://a b:1:2"])
def test_no_address(address: str) -> None:
    with pytest.raises(RequestError, match="sc://HOST:PORT"):
        connect.check_server(address)


def test_a_server_that_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect.check_server(f"sc://127.0.0.1:{port}/;user_id=me")
        connect.check_server(f"sc://127.0.0.1:{port}")


def test_without_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingError, match=r"pip install 'pomona\[connect\]'"):
        connect.check_server("sc://127.0.0.1")


if __name__ == "__main__":
    print(json.dumps(over_connect(*sys.argv[1:])))
