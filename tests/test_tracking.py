from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from pomona import stages, tracking
from pomona.manifest import open_out
from pomona.stages import ExtractOptions, ReduceOptions

# MLflow and SQLAlchemy warn of each other's deprecations when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUICK = ExtractOptions(weights="random:0", image_size=32, device="cpu")


@pytest.fixture
def records(spark: Any, source: Path, tmp_path: Path) -> Any:
    return stages.run(source, tmp_path / "out", QUICK, ReduceOptions(5))


def test_one_run_is_recorded_in_out(records: Any, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    told = stages.track(tmp_path / "out", records)
    uri, run = told.rsplit(", run ", 1)
    assert uri == f"sqlite:///{tmp_path / 'out'}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    found = client.get_run(run)
    assert found.info.status == "FINISHED"
    assert found.data.params["weights"] == "random:0"
    assert found.data.params["components"] == "5"
    assert found.data.metrics["photos"] == 48
    assert found.data.metrics["variance_kept"] == pytest.approx(records["reduce"]["variance_kept"])
    assert found.data.metrics["photos_per_second"] > 0
    names = {artifact.path for artifact in client.list_artifacts(run)}
    assert names == {"manifest.json", "pca_variance.png", "rejected.csv"}


def test_a_server_that_is_down_costs_nothing(
    records: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    start = time.monotonic()
    told = stages.track(tmp_path / "out", records)
    assert told.startswith("not recorded: MLflow at http://127.0.0.1")
    assert time.monotonic() - start < 60


def test_without_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    told = tracking.record(open_out(tmp_path / "out"), {}, {}, [])
    assert "pip install 'pomona[mlflow]'" in told
