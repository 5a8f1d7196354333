"""Runs in MLflow: what they hold, where they are, and what a server that is down costs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pomona.registry import tracking
from pomona.workspace.layout import open_out
from tests.registry.conftest import free_port

# MLflow and SQLAlchemy warn of each other's deprecations when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def record(out: Path, records: Any) -> str:
    folder = open_out(out)
    return tracking.record(folder, *tracking.figures(records), tracking.artifacts(folder))


def paths(client: Any, run: str, folder: str | None = None) -> set[str]:
    files: set[str] = set()
    for entry in client.list_artifacts(run, folder):
        files |= paths(client, run, entry.path) if entry.is_dir else {entry.path}
    return files


def test_one_run_is_recorded_in_out(out: Path, records: Any) -> None:
    mlflow = pytest.importorskip("mlflow")
    before = dict(os.environ)
    sentence = record(out, records)
    assert dict(os.environ) == before
    uri, run = sentence.rsplit(", run ", 1)
    assert uri == f"sqlite:///{out}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    entity = client.get_run(run)
    assert entity.info.status == "FINISHED"
    assert entity.data.params["weights"] == "fruits"
    assert entity.data.params["components"] == "20"
    train = records["train"]
    assert entity.data.params["model"] == train["digests"]["model.onnx"][:12]
    assert float(entity.data.params["temperature"]) == train["temperature"]
    numbers = entity.data.metrics
    assert numbers["photos"] == 48
    assert numbers["variance_kept"] == pytest.approx(records["reduce"]["variance_kept"])
    assert numbers["photos_per_second"] > 0
    test = train["metrics"]["test"]
    assert numbers["test_accuracy"] == test["accuracy"]["value"]
    assert numbers["test_macro_f1_low"] == test["macro_f1"]["low"]
    assert numbers["test_photos"] == 24
    assert {"cv_accuracy", "test_calibration_error", "seconds_train_fit"} <= set(numbers)
    assert paths(client, run) == {
        "manifest.json",
        "rejected.csv",
        "model/classifier.safetensors",
        "model/model.json",
        "model/model.onnx",
        *(f"report/{path.name}" for path in (out / "report").iterdir()),
    }
    assert {"report/report.html", "report/metrics.json"} <= paths(client, run)


def test_the_run_of_this_model_is_found_again(out: Path, records: Any) -> None:
    pytest.importorskip("mlflow")
    run = record(out, records).rsplit(", run ", 1)[1]
    about = json.loads((out / "manifest.json").read_text())["stages"][tracking.STAGE]
    model = json.loads((out / "model" / "model.json").read_text())["digest"]
    assert about == {"store": f"sqlite:///{out}/mlflow.db", "run": run, "model": model}
    folder = open_out(out)
    with tracking.connected(tracking.store_of(folder)) as client:
        assert tracking.recorded_run(client, folder) == run
        (out / "model" / "model.json").write_text('{"digest": "of another"}')
        assert tracking.recorded_run(client, folder) is None
        (out / "model" / "model.json").write_text(json.dumps({"digest": model}))
        client.delete_run(run)
        assert tracking.recorded_run(client, folder) is None


def test_databases_that_several_outs_share(
    out: Path, records: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Artefacts lie beside the database, not in the OUT that came first."""
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'shared' / 'all.db'}"
    (tmp_path / "shared").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run = record(out, records).rsplit(", run ", 1)[1]
    place = mlflow.MlflowClient(uri).get_run(run).info.artifact_uri
    assert place.startswith((tmp_path / "shared" / "mlflow-artifacts").as_uri())


def test_runs_without_training(records: Any) -> None:
    some = {name: records[name] for name in ("extract", "reduce")}
    params, numbers = tracking.figures(some)
    assert tracking.figures({**some, "train": {"skipped": "one label"}}) == (params, numbers)
    assert "strength" not in params
    assert not any(name.startswith(("cv_", "test_acc", "seconds_train")) for name in numbers)


def test_a_server_that_is_down_costs_nothing(
    out: Path, records: Any, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:secret@127.0.0.1:{port}")
    sentence = record(out, records)
    assert sentence.startswith(f"not recorded: MLflow at http://127.0.0.1:{port} failed")
    assert "secret" not in sentence
    assert sum(naps) < 10
    assert tracking.STAGE not in json.loads((out / "manifest.json").read_text())["stages"]


def test_without_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    sentence = tracking.record(open_out(tmp_path / "out"), {}, {}, [])
    assert "pip install 'pomona[track]'" in sentence
