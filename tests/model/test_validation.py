"""A model from elsewhere: every fault has one line of ours, before anything answers."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from pomona.backbone.spec import make_spec
from pomona.backbone.weights import load_weights
from pomona.core.errors import PomonaError, RequestError, WeightsError
from pomona.model import artifact, validation
from tests.broken_models import BROKEN, external, sealed, whole
from tests.conftest import photo


def refused(folder: Path) -> str:
    with pytest.raises(RequestError) as told:
        artifact.load_model(folder)
    text = str(told.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    folder = whole(tmp_path / "model")
    artifact.load_model(folder)
    BROKEN[name](folder)
    assert str(folder) in refused(folder)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("no preprocessing", "preprocessing must be Pomona's own"),
        ("unknown method", r"unknown must be an object with a method \(max_probability, energy"),
        ("labels: one more", r"no tensor weight, floating point \[3, 3\]"),
        ("output: a label more", r"no output probabilities, float32 \[n, 2\]"),
        ("image_size: 64", r"must take image alone, uint8 \[n, 64, 64, 3\]"),
        ("external: branch", "keeps 'inner' in another file, which is refused: save it with all"),
        ("bomb: shape", "asks for 'bomb' of 100000 × 100000 numbers"),
        ("input: one photo only", "can't be run by ONNX Runtime"),
    ],
)
def test_the_line_says_what_is_wrong(name: str, rule: str, tmp_path: Path) -> None:
    folder = whole(tmp_path / "model")
    BROKEN[name](folder)
    with pytest.raises(RequestError, match=rule):
        artifact.load_model(folder)


def test_data_in_the_working_directory_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime would: a model of bytes has no folder of its own."""
    folder = whole(tmp_path / "model")
    proto = onnx.load(folder / "model.onnx")
    (mean,) = [tensor for tensor in proto.graph.initializer if tensor.name == "head.mean"]
    (tmp_path / "outside.bin").write_bytes(mean.raw_data)
    external(mean)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    sealed(folder)
    monkeypatch.chdir(tmp_path)
    assert "in another file" in refused(folder)


@pytest.mark.parametrize("name", ["model.onnx", "classifier.safetensors"])
def test_bytes_by_chance(name: str, tmp_path: Path) -> None:
    """Whatever the bytes, the model loads or the error is ours."""
    chance = random.Random(0)
    folder = whole(tmp_path / "model")
    right = (folder / name).read_bytes()
    for _ in range(60):
        content = bytearray(right)
        for _ in range(chance.choice([1, 2, 5])):
            place = chance.randrange(1500)  # the operators, and the tensors' names and shapes
            content[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(4))
        (folder / name).write_bytes(content)
        sealed(folder)
        try:
            artifact.load_model(folder).head()
        except PomonaError as error:
            assert "\n" not in str(error)


def test_what_a_threshold_and_a_bias_may_be(tmp_path: Path) -> None:
    """Nothing could be held out; training didn't see a label."""
    folder = whole(tmp_path / "model")
    about: dict[str, Any] = artifact.load_model(folder).about
    artifact.write_about(folder, {**about, "unknown": {**about["unknown"], "threshold": -np.inf}})
    artifact.load_model(folder)
    tensors = load_file(folder / "classifier.safetensors")
    unseen = np.where(np.arange(2) == 0, -np.inf, tensors["bias"])
    assert validation.read_tensors(_saved({**tensors, "bias": unseen}), about, "it")


def _saved(tensors: dict[str, Any]) -> bytes:
    from safetensors.numpy import save

    return save(tensors)


def test_a_model_keeps_what_was_checked(tmp_path: Path) -> None:
    model = artifact.load_model(folder := whole(tmp_path / "model"))
    shutil.rmtree(folder)
    assert model.head().classifier.labels == model.labels


@pytest.mark.parametrize(
    "name", ["external: initializer", "external: constant", "bomb: shape", "input: float"]
)
def test_weights_as_onnx_are_checked_alike(name: str, tmp_path: Path) -> None:
    folder = whole(tmp_path / "model")  # its network has the output features, too
    spec = make_spec(load_weights(str(folder / "model.onnx")), image_size=32, device="cpu")
    assert spec.payload == (folder / "model.onnx").read_bytes()
    BROKEN[name](folder)
    with pytest.raises(WeightsError, match=r"model\.onnx"):
        make_spec(load_weights(str(folder / "model.onnx")), image_size=32, device="cpu")


def test_predict_says_one_line(tmp_path: Path, command: Any) -> None:
    folder = whole(tmp_path / "model")
    (tmp_path / "photo.jpg").write_bytes(photo())
    BROKEN["model.onnx: text"](folder)
    code, output, errors = command("predict", tmp_path / "photo.jpg", "--model", folder)
    assert (code, output) == (2, "")
    assert errors.splitlines() == [
        f"pomona: {folder}/model.onnx is damaged, or no ONNX file: fetch or make it again"
    ]
