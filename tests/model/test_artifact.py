from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pyarrow as pa
import pytest

from pomona.core.errors import MismatchError, RequestError
from pomona.model import artifact, unknown
from pomona.model.head import OUTPUTS, to_onnx
from pomona.model.recogniser import ANSWERS, make_recogniser, recognise
from pomona.photos import decoding
from tests.conftest import photo
from tests.small_model import SIZE, small_head, small_spec

pytest.importorskip("sklearn")


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("method", unknown.METHODS)
def test_the_file_and_numpy_agree(features: Any, method: str, power: float) -> None:
    """model.onnx alone against the head in float64, for every detector."""
    top = small_head(features, method, power)
    session = ort.InferenceSession(
        to_onnx(small_spec().payload, top), providers=["CPUExecutionProvider"]
    )
    decoded = [decoding.decode(photo(1000 * (n % 3) + n), SIZE).pixels for n in range(36)]
    found = session.run(list(OUTPUTS), {"image": np.stack([d for d in decoded if d is not None])})
    wanted = top.apply(features)
    assert [f.shape for f in found] == [(36, 3), (36,), (36, 6), (36, 1280)]
    assert {f.dtype for f in found} == {np.dtype(np.float32)}
    np.testing.assert_allclose(found[0], wanted["probabilities"], atol=1e-4)
    assert (found[0].argmax(axis=1) == wanted["probabilities"].argmax(axis=1)).all()
    np.testing.assert_allclose(found[1], wanted["score"], rtol=1e-3, atol=2e-2)
    np.testing.assert_allclose(found[2], wanted["pca_features"], rtol=1e-3, atol=1e-3)


def test_the_folder_comes_back(small_model: Path, features: Any) -> None:
    found = artifact.load_model(small_model)
    assert found.labels == ("a", "b", "ünknown")
    again, made = found.head(), small_head(features)
    for name, value in made.apply(features).items():
        np.testing.assert_array_equal(again.apply(features)[name], value)
    session = ort.InferenceSession(found.content, providers=["CPUExecutionProvider"])
    (put,) = session.get_inputs()
    assert (put.name, put.type, put.shape) == ("image", "tensor(uint8)", ["n", SIZE, SIZE, 3])
    assert tuple(output.name for output in session.get_outputs()) == OUTPUTS
    assert {path.name for path in small_model.iterdir()} == {"model.json", *artifact.FILES}


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*artifact.FILES, "model.json"])
def test_a_changed_byte_is_found(small_model: Path, name: str) -> None:
    size = (small_model / name).stat().st_size
    for place in (0, size // 3, size // 2, size - 2):
        shutil.copytree(small_model, small_model.parent / "copy", dirs_exist_ok=True)
        flip(small_model.parent / "copy" / name, place)
        with pytest.raises(MismatchError, match=r"changed|damaged|format") as told:
            artifact.load_model(small_model.parent / "copy")
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", artifact.FILES)
def test_a_missing_file(small_model: Path, name: str) -> None:
    (small_model / name).unlink()
    with pytest.raises(MismatchError, match=f"{name} is missing"):
        artifact.load_model(small_model)


def test_no_model_and_a_newer_one(small_model: Path) -> None:
    with pytest.raises(RequestError, match="there is no model in"):
        artifact.load_model(small_model / "nowhere")
    about = json.loads((small_model / "model.json").read_text())
    (small_model / "model.json").write_text(json.dumps({**about, "format": 99}))
    with pytest.raises(MismatchError, match="has format 99, and this Pomona reads up to 1"):
        artifact.load_model(small_model)
    (small_model / "model.json").write_text("[1, 2]")
    with pytest.raises(MismatchError, match="damaged"):
        artifact.load_model(small_model)


def test_answers(small_model: Path) -> None:
    found = make_recogniser(artifact.load_model(small_model), top=2)
    contents = [photo(0), None, b"", b"no photo", photo(5)[:300]]
    batch = pa.record_batch(
        {"path": pa.array(list("abcde")), "content": pa.array(contents, pa.binary())}
    )
    (rows,) = recognise(iter([batch]), pickle.loads(pickle.dumps(found)))
    assert rows.schema.names == ["path", *ANSWERS.names]
    first, *bad = rows.to_pylist()
    assert first["label"] == first["nearest"][0]
    assert len(first["nearest"]) == len(first["probabilities"]) == 2
    assert first["probability"] == first["probabilities"][0]
    codes = ["unreadable", "empty", "not_an_image", "truncated"]
    assert [row["error"] for row in bad] == codes
    assert all(row["label"] is row["unknown"] is row["nearest"] is None for row in bad)


def test_unknown_has_a_reason_and_the_nearest_labels(small_model: Path) -> None:
    found = replace(make_recogniser(artifact.load_model(small_model)), threshold=1e9)
    batch = pa.record_batch({"content": pa.array([photo(0)], pa.binary())})
    (row,) = next(recognise(iter([batch]), found)).to_pylist()
    assert row["unknown"] is True
    assert row["label"] is None
    assert row["reason"] == "too far from every kind of photo that the model was trained on"
    assert len(row["nearest"]) == 3


def test_batches_of_any_size_and_only_bad_photos(small_model: Path) -> None:
    found = make_recogniser(artifact.load_model(small_model))
    assert list(recognise(iter([]), found)) == []
    for count in (0, 1, found.spec.batch_size, found.spec.batch_size + 1):
        batch = pa.record_batch(
            {"content": pa.array([photo(n) for n in range(count)], pa.binary())}
        )
        (rows,) = recognise(iter([batch]), found)
        assert rows.num_rows == count
        assert rows["score"].null_count == 0
    batch = pa.record_batch({"content": pa.array([b"", None], pa.binary())})
    (rows,) = recognise(iter([batch]), found)
    assert rows["error"].to_pylist() == ["empty", "unreadable"]
