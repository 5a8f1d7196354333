"""What version 0.1 wrote is read and worked on; tests/data/0.1/README.md says how it was made."""

from __future__ import annotations

import base64
import importlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pomona.core.files import read_json
from pomona.model.artifact import load_model
from pomona.model.recogniser import make_recogniser, recognise
from pomona.pipeline.reduce import ReduceOptions, reduce
from pomona.pipeline.run import report
from pomona.pipeline.status import status
from pomona.pipeline.train import train

EARLIER = Path(__file__).parent / "data" / "0.1"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    shutil.copytree(EARLIER / "out", tmp_path / "out")
    return tmp_path / "out"


def pattern() -> bytes:
    """A photo without loss, and without a random generator, that gives the same pixels anywhere."""
    values = np.arange(32 * 32 * 3) * 37 % 256
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint8).reshape(32, 32, 3)).save(file, "PNG")
    return file.getvalue()


def test_a_model_answers_as_it_did() -> None:
    model = load_model(EARLIER / "out" / "model")
    assert model.labels == ("Fruit 0", "Fruit 1")
    batch = pa.record_batch({"content": pa.array([pattern()], pa.binary())})
    (row,) = next(recognise(iter([batch]), make_recogniser(model))).to_pylist()
    assert (row["label"], row["unknown"], row["error"]) == ("Fruit 0", False, None)
    assert row["nearest"] == ["Fruit 0", "Fruit 1"]
    np.testing.assert_allclose(row["probabilities"], [0.5378725528, 0.4621273577], atol=1e-5)
    assert row["score"] == pytest.approx(-0.7671305537, rel=1e-4)


def test_status(out: Path) -> None:
    found = status(out)
    assert found["finished"] == ["extract", "reduce", "train"]
    assert (found["photos"], found["todo"], found["rejected"]) == (13, 0, {"empty": 1})


def test_reduce_goes_on(out: Path) -> None:
    stages = read_json(out / "manifest.json")["stages"]
    same = ReduceOptions(components=3, plots=False)
    assert reduce(out, same) == stages["reduce"]
    assert reduce(out, ReduceOptions(components=2, plots=False))["components"] == 2
    assert status(out)["finished"] == ["extract", "reduce"]
    assert train(out)["labels"] == 2
    again = reduce(out, same)
    assert again["variance_kept"] == pytest.approx(stages["reduce"]["variance_kept"])


def test_train_goes_on(out: Path) -> None:
    pytest.importorskip("sklearn")
    earlier = read_json(out / "manifest.json")["stages"]["train"]
    metrics = read_json(out / "report" / "metrics.json")
    assert train(out) == earlier
    shutil.rmtree(out / "model")
    again = train(out)
    assert again["made_from"] == earlier["made_from"]
    assert (again["strength"], again["unknown"]["method"]) == (
        earlier["strength"],
        earlier["unknown"]["method"],
    )
    assert again["temperature"] == pytest.approx(earlier["temperature"])
    now = read_json(out / "report" / "metrics.json")
    assert now.keys() == metrics.keys()
    assert now["test"].keys() == metrics["test"].keys()
    assert now["test"]["confusion"] == metrics["test"]["confusion"]


def test_the_report_of_an_earlier_out(out: Path) -> None:
    for name in ("sklearn", "matplotlib", "jinja2"):
        pytest.importorskip(name)
    assert "photos" in report(out).read_text()


def test_a_saved_stage_loads_by_its_earlier_name(spark: Any) -> None:
    from pyspark.ml.util import DefaultParamsReader

    import pomona

    (file,) = (EARLIER / "stage" / "metadata").glob("part-*")
    assert json.loads(file.read_text())["class"] == "pomona.sparkml.MobileNetV2Features"
    stage = DefaultParamsReader.loadParamsInstance(str(EARLIER / "stage"), spark)
    assert isinstance(stage, pomona.MobileNetV2Features)
    assert (stage.getImageSize(), stage.getInputCol()) == (32, "content")


def test_a_registered_model_loads_by_its_earlier_name(tmp_path: Path) -> None:
    pyfunc = pytest.importorskip("mlflow.pyfunc")
    import pandas as pd

    folder = tmp_path / "registered"
    shutil.copytree(EARLIER / "registered", folder)
    (folder / "code").mkdir()  # that of version 0.1: here is another
    shutil.copytree(EARLIER / "out" / "model", folder / "data" / "model")
    assert "loader_module: pomona.pyfunc" in (folder / "MLmodel").read_text()
    loaded = pyfunc.load_model(str(folder))
    rows = loaded.predict(pd.DataFrame({"image": [base64.b64encode(pattern()).decode()]}))
    assert list(rows["nearest"][0]) == ["Fruit 0", "Fruit 1"]


def test_the_entry_point_of_earlier_jobs() -> None:
    from pomona.cli.spark_job import main

    assert importlib.import_module("pomona.sparkjob").main is main
