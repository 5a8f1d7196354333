"""OUT after a whole run, with an empty MLflow registry, for all tests of this folder."""

from __future__ import annotations

import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pomona.model import artifact, classifier, pca_table
from pomona.model.head import Head
from pomona.model.recogniser import make_recogniser, recognise
from pomona.pipeline.extract import ExtractOptions
from pomona.pipeline.reduce import ReduceOptions
from pomona.pipeline.run import run
from pomona.pipeline.train import TrainOptions
from pomona.registry import tracking
from pomona.workspace import layout
from tests.conftest import fill

QUICK = ExtractOptions(weights="fruits", image_size=32, device="cpu")


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """OUT of a whole run and its records; MLflow takes seconds to make the empty database."""
    pytest.importorskip("mlflow")
    pytest.importorskip("sklearn")
    base = tmp_path_factory.mktemp("ran")
    few = ReduceOptions(20, plots=False)
    records = run(fill(base / "source"), base / "out", QUICK, few, train_options=TrainOptions())
    (base / "out" / "report" / "report.html").write_text("<p>All is well.</p>")
    with tracking.connected(f"sqlite:///{base / 'out' / 'mlflow.db'}") as client:
        client.search_registered_models()
    return base / "out", records


@pytest.fixture
def records(ran: tuple[Path, Any]) -> Any:
    return ran[1]


@pytest.fixture
def out(ran: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of OUT, and a cache of its own."""
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    monkeypatch.setenv("POMONA_CACHE", str(tmp_path / "cache"))
    shutil.copytree(ran[0], tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that HTTP clients would wait between attempts; they go on at once."""
    seconds: list[float] = []
    clock = SimpleNamespace(sleep=seconds.append, time=time.time, mktime=time.mktime)
    monkeypatch.setattr("urllib3.util.retry.time", clock)
    return seconds


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def store(out: Path) -> str:
    return f"sqlite:///{out}/mlflow.db"


def put(out: Path, head: Head, **about: Any) -> artifact.Model:
    """Replace OUT's model and return it."""
    old = artifact.load_model(out / "model").about
    backbone = (out / "features" / "_backbone.onnx").read_bytes()
    artifact.save_model(out / "model", backbone, head, {**old, **about})
    return artifact.load_model(out / "model")


def perfect(out: Path) -> Head:
    """A head that has learned Test by heart."""
    photos = pca_table.read_photos(layout.open_out(out), "test_pca", 10**6)
    labels, y = classifier.encode(photos.labels.tolist())
    head = artifact.load_model(out / "model").head()
    fitted = classifier.fit(photos.z, y, labels, 1.0)
    assert (fitted.logits(photos.z).argmax(axis=1) == y).all()
    return replace(head, classifier=fitted)


def wrong(out: Path) -> Head:
    """A head that is never right on Test."""
    best = perfect(out)
    turned = replace(best.classifier, weight=-best.classifier.weight, bias=-best.classifier.bias)
    return replace(best, classifier=turned)


def flipped(out: Path) -> Head:
    """A head whose weights have the other sign."""
    head = artifact.load_model(out / "model").head()
    return replace(head, classifier=replace(head.classifier, weight=-head.classifier.weight))


def answer(model: artifact.Model, content: bytes | None) -> dict[str, Any]:
    batch = pa.record_batch({"content": pa.array([content], pa.binary())})
    (answered,) = recognise(iter([batch]), make_recogniser(model))
    return dict(answered.to_pylist()[0])
