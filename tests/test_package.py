"""What the package holds: weights that know fruit, a model on them, their card."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file

from pomona.backbone import extract, mobilenet, weights
from pomona.backbone.spec import make_spec
from pomona.cli import render
from pomona.model import artifact
from pomona.photos import synthetic
from pomona.pipeline.predict import PredictOptions, predict
from tests.conftest import benchmark

DATA = weights.FRUITS.parent


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def about() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(weights.FRUITS.with_suffix(".json").read_text())
    return found


@pytest.mark.usefixtures("_no_network")
def test_weights_are_what_their_json_says() -> None:
    found = weights.load_weights("fruits")
    assert found.trained and found.name == "fruits"
    assert found.digest == about()["digest"]
    assert {str(value.dtype) for value in load_file(weights.FRUITS).values()} == {"float16"}
    assert weights.FRUITS.stat().st_size == about()["bytes"] < 5e6
    assert len(found.tuned_on) == about()["runs"][0]["groups"]


def test_they_came_from_random_numbers() -> None:
    first, second = about()["runs"]
    seed = first["made_from"]["settings"]["seed"]
    start = weights.load_weights(f"random:{seed}")
    assert first["made_from"]["from"] == {"name": start.name, "digest": start.digest}
    assert first["recipe"]["norm"] and not second["recipe"]["norm"]
    assert first["recipe"]["apart"] > 0 and first["recipe"]["distill"] > 0


def test_none_of_imagenet_s_values_is_in_them(real_weights: Path) -> None:
    """Two networks that were not made from each other point elsewhere, filter by filter."""
    ours = mobilenet.folded(weights.load_weights("fruits").state or {})
    theirs = mobilenet.folded(weights.load_weights(str(real_weights)).state or {})
    for conv in mobilenet.convs():
        a, b = (
            found[f"{conv.weight}.weight"].reshape(conv.outputs, -1) for found in (ours, theirs)
        )
        assert not np.any((np.abs(a - b) < 1e-3 * np.abs(b)).all(axis=1))
        cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert abs(np.nanmedian(cosines)) < 0.5, conv
        if conv.groups == 1:  # nor in another order: the most alike of all pairs are far from alike
            of_pairs = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (
                b / np.maximum(np.linalg.norm(b, axis=1, keepdims=True), 1e-9)
            ).T
            assert np.median(np.abs(of_pairs).max(axis=1)) < 0.9, conv


def test_the_card_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    fruits = benchmark("fruits", monkeypatch)
    assert (DATA / "README.md").read_text() == fruits.card(about())


@pytest.mark.usefixtures("_no_network")
def test_the_model_is_on_these_weights_and_says_how_good_it_is() -> None:
    found = artifact.load_model(artifact.PACKAGED)
    assert found.labels == ("Apple", "Cherry", "Tomato")
    assert found.about["weights"] == {
        "name": "fruits",
        "digest": weights.load_weights("fruits").digest,
        "trained": True,
    }
    assert found.version == about()["model"]["version"]
    right = found.about["metrics"]["test"]["accuracy"]["value"]
    assert right == about()["figures"]["unseen"]
    line = render.which(found)
    assert f"the package's model {found.version}" in line
    assert f"right on {right:.1%}" in line and "untrained" not in line


def test_its_half_precision_costs_nothing(tmp_path: Path) -> None:
    """The file against the weights and the classifier beside it, in float32 and NumPy."""
    found = artifact.load_model(artifact.PACKAGED)
    spec = make_spec(
        weights.load_weights("fruits"), image_size=found.spec().image_size, device="cpu"
    )
    synthetic.synthesize(tmp_path, classes=3, images=24, workers=1)
    photos = [path.read_bytes() for path in sorted(tmp_path.rglob("*.jpg"))]
    batch = pa.record_batch({"content": pa.array(photos, pa.binary())})
    (rows,) = extract.extract(iter([batch]), spec)
    features = np.array(rows["features"].to_pylist(), np.float32)
    wanted = found.head().apply(features)
    (got,) = extract.extract(iter([batch]), found.spec())
    assert np.allclose(got["probabilities"].to_pylist(), wanted["probabilities"], atol=1e-3)
    assert np.allclose(got["score"].to_pylist(), wanted["score"], rtol=1e-2)


def predict_command(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user without a network would: every proxy is a dead end."""
    dead = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    return subprocess.run(
        [sys.executable, "-m", "pomona", "predict", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **dead},
        timeout=120,
        check=False,
    )


def test_predict_without_a_model(tmp_path: Path) -> None:
    synthetic.synthesize(tmp_path, classes=3, images=12, workers=1)
    photo = str(next(tmp_path.rglob("*.jpg")))
    told = predict_command(photo, "--json")
    assert told.returncode == 0, told.stderr
    assert told.stderr.startswith("pomona: the package's model ")
    answer = json.loads(told.stdout)
    assert answer["model"] == about()["model"]["version"]
    named = predict_command(photo, "--json", "--model", str(artifact.PACKAGED))
    assert json.loads(named.stdout) == answer
    assert "the package's model" not in named.stderr


@pytest.mark.usefixtures("_no_network")
def test_it_knows_varieties_that_it_never_saw(real_photos: Path) -> None:
    real = sorted((real_photos / "Test").rglob("*.jpg"))[::40]
    found = artifact.load_model(artifact.PACKAGED)
    rows: list[dict[str, Any]] = []
    predict(
        [str(path) for path in real],
        found,
        PredictOptions(),
        on_answers=lambda batch: rows.extend(batch.to_pylist()),
    )
    right = [row["nearest"][0] == Path(row["path"]).parts[-3] for row in rows]
    assert len(right) == len(real)
    assert np.mean(right) > 0.8
