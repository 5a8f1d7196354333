from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pomona import MobileNetV2Extractor
from pomona.backbone import extract as extract_module
from pomona.backbone import mobilenet, weights
from pomona.backbone import session as session_module
from pomona.backbone import spec as spec_module
from pomona.backbone.extract import extract, extract_photos, feature_column, load_network
from pomona.backbone.session import onnx_session
from pomona.backbone.spec import BackboneSpec, make_spec
from pomona.core.errors import MissingError, RequestError, WeightsError
from pomona.core.schema import FEATURES_TABLE
from tests.conftest import CANONICAL, photo

SIZE = 64  # small, so that tests are quick


@pytest.fixture(scope="module")
def spec() -> BackboneSpec:
    return make_spec(weights.load_weights("fruits"), image_size=SIZE, device="cpu")


def batch(*contents: bytes | None) -> pa.RecordBatch:
    names = pa.array([f"{n}.jpg" for n in range(len(contents))], pa.string())
    return pa.record_batch({"path": names, "content": pa.array(contents, pa.binary())})


def features(batches: Iterator[pa.RecordBatch]) -> Any:
    return np.array([row for b in batches for row in b["features"].to_pylist()], np.float32)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 17])
def test_any_batch_size_comes_out_as_it_went_in(spec: BackboneSpec, count: int) -> None:
    (rows,) = extract(iter([batch(*[photo(n) for n in range(count)])]), spec)
    assert rows.num_rows == count
    assert rows.schema.names == ["path", "width", "height", "features", "error"]
    for name in rows.schema.names[1:]:
        assert rows.schema.field(name).type == FEATURES_TABLE.field(name).type
    assert all(len(row) == 1280 for row in rows["features"].to_pylist())


def test_no_batches(spec: BackboneSpec) -> None:
    assert list(extract(iter([]), spec)) == []


def test_batch_size_changes_nothing(spec: BackboneSpec) -> None:
    contents = [photo(n) for n in range(9)]
    whole = features(extract(iter([batch(*contents)]), spec))
    for size in (1, 2, 9, 64):
        other = replace(spec, batch_size=size)
        assert np.abs(features(extract(iter([batch(*contents)]), other)) - whole).max() <= 1e-5
    single = features(extract(iter([batch(c) for c in contents]), spec))
    assert np.abs(single - whole).max() <= 1e-5


def test_a_bad_photo_is_a_row_in_its_place(spec: BackboneSpec) -> None:
    contents = [photo(1), None, b"", b"text", photo(2)[:500], photo(3)]
    (rows,) = extract(iter([batch(*contents)]), spec)
    assert rows["error"].to_pylist() == [
        None, "unreadable", "empty", "not_an_image", "truncated", None,
    ]  # fmt: skip
    assert [row is None for row in rows["features"].to_pylist()] == [
        False, True, True, True, True, False,
    ]  # fmt: skip
    alone = features(extract(iter([batch(photo(3))]), spec))[0]
    assert np.abs(np.array(rows["features"].to_pylist()[5]) - alone).max() <= 1e-5


def test_only_bad_photos(spec: BackboneSpec) -> None:
    (rows,) = extract(iter([batch(None, b"")]), spec)
    assert rows["features"].null_count == 2


def test_other_columns_travel_along(spec: BackboneSpec) -> None:
    rows = batch(photo(0)).append_column("label", pa.array(["Kiwi"]))
    (out,) = extract(iter([rows]), spec)
    assert out["label"].to_pylist() == ["Kiwi"]


def test_a_spec_crosses_to_workers(spec: BackboneSpec) -> None:
    again = pickle.loads(pickle.dumps(spec))
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.payload == spec.payload
    assert "payload" not in repr(spec)


def test_a_session_is_built_once(spec: BackboneSpec) -> None:
    load_network.cache_clear()
    for n in range(3):
        list(extract(iter([batch(photo(n))]), pickle.loads(pickle.dumps(spec))))
    assert load_network.cache_info().misses == 1


def test_the_onnx_file_says_what_it_takes(spec: BackboneSpec) -> None:
    import onnxruntime as ort

    session = ort.InferenceSession(spec.payload, providers=["CPUExecutionProvider"])
    (put,) = session.get_inputs()
    assert (put.name, put.type, put.shape) == ("image", "tensor(uint8)", ["n", SIZE, SIZE, 3])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["preprocessing"]) == mobilenet.preprocessing(SIZE)
    assert about["weights_digest"] == spec.digest


def test_backends_agree(spec: BackboneSpec) -> None:
    pytest.importorskip("torch")
    other = make_spec(
        weights.load_weights("fruits"), image_size=SIZE, backend="torch", device="cpu"
    )
    contents = [photo(n) for n in range(5)]
    one, two = (features(extract(iter([batch(*contents)]), s)) for s in (spec, other))
    assert np.abs(one - two).max() <= 1e-3
    assert other.fingerprint() != spec.fingerprint()


def test_threads_change_nothing(spec: BackboneSpec) -> None:
    contents = [photo(n) for n in range(20)]
    one = features(extract(iter([batch(*contents)]), spec))
    two = features(extract(iter([batch(*contents)]), replace(spec, threads=4)))
    assert np.abs(one - two).max() <= 1e-5


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_one_photo_alone_as_among_others(backend: str) -> None:
    """Alone it isn't copied, and is not writable."""
    if backend == "torch":
        pytest.importorskip("torch")
    spec = make_spec(weights.load_weights("fruits"), image_size=SIZE, backend=backend, device="cpu")

    def features(*contents: bytes) -> Any:
        batch = pa.record_batch({"content": pa.array(contents, pa.binary())})
        return np.array(next(extract(iter([batch]), spec))["features"].to_pylist())

    alone, among = features(photo(1)), features(photo(1), photo(2))
    np.testing.assert_allclose(alone[0], among[0], atol=1e-5)


@pytest.mark.parametrize("name", ["onnx", "torch"])
def test_canonical_features(name: str, real_photos: Path, real_weights: Path) -> None:
    """Against float64 values of an independent implementation (shared/data)."""
    if name == "torch":
        pytest.importorskip("torch")
    extractor = MobileNetV2Extractor(weights=str(real_weights), backend=name, device="cpu")
    wanted = json.loads(CANONICAL.read_text())["images"]
    rows = extractor.extract_batch([(real_photos / w["path"]).read_bytes() for w in wanted])
    for row, want in zip(rows.astype(np.float64), wanted, strict=True):
        first = np.array(want["first8"])
        assert np.abs(row[:8] - first).max() <= 1e-3
        assert row[:8] @ first / np.linalg.norm(row[:8]) / np.linalg.norm(first) >= 0.99999
        assert abs(row.mean() - want["mean"]) <= 1e-3
        assert abs(np.linalg.norm(row) - want["l2"]) <= 1e-3
        assert row.argmax() == want["argmax"]
        assert abs(int((row == 0).sum()) - want["zeros"]) <= 1


def test_backends_agree_on_real_photos(real_photos: Path, real_weights: Path) -> None:
    """All 1280 values, not only the eight that the canonical file holds."""
    pytest.importorskip("torch")
    files = sorted(real_photos.glob("T*/*/*/*.jpg"))[::400]
    contents = [path.read_bytes() for path in files]
    one, two = (
        MobileNetV2Extractor(weights=str(real_weights), backend=b, device="cpu")
        .extract_batch(contents)
        .astype(np.float64)
        for b in ("onnx", "torch")
    )
    assert np.abs(one - two).max() <= 1e-3
    cosine = (one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)
    assert cosine.min() >= 0.99999


# --- requests that can't be met ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"image_size": 8}, "32 to 1024"),
        ({"backend": "tf"}, "onnx or torch"),
        ({"device": "tpu"}, "auto, cpu or cuda"),
        ({"batch_size": 0}, "at least one"),
    ],
)
def test_options_have_rules(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(RequestError, match=rule):
        make_spec(weights.load_weights("fruits"), **options)


def test_cuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec_module, "_sees_cuda", lambda name: False)
    assert make_spec(weights.load_weights("fruits"), image_size=SIZE).device == "cpu"
    with pytest.raises(MissingError, match="--device cpu"):
        make_spec(weights.load_weights("fruits"), device="cuda")


def test_a_gpu_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """By configuration only: there is no GPU here."""
    from pomona.spark.resources import local_master

    monkeypatch.setattr(spec_module, "_sees_cuda", lambda name: True)
    monkeypatch.setattr(session_module, "gpu_memory", lambda: 8 << 30)
    spec = make_spec(weights.load_weights("fruits"), backend="torch")
    assert (spec.device, spec.precision) == ("cuda", "mixed")
    assert local_master("local[*]", "cuda") in ("local[1]", "local[2]")
    assert local_master("local[4]", "cuda") == "local[4]"
    assert local_master("local[*]", "cpu") == "local[*]"
    asked: dict[str, Any] = {}

    class Session:
        def __init__(self, content: bytes, options: object, providers: list[Any]) -> None:
            asked["providers"] = providers

    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    onnx_session(b"", 2, "cuda", 0.45, 1)
    name, settings = asked["providers"][0]
    assert name == "CUDAExecutionProvider"
    assert settings["gpu_mem_limit"] == int((8 << 30) * 0.45)


@pytest.mark.parametrize(
    ("conf", "threads", "share"),
    [
        ({"spark.master": "yarn", "spark.executor.cores": "8", "spark.task.cpus": "4"}, 4, 0.45),
        ({"spark.master": "spark://h:7077", "spark.executor.cores": "4"}, 2, 0.225),
        ({"spark.master": "yarn"}, 2, 0.9),
    ],
)
def test_a_gpu_worker_takes_its_share(conf: dict[str, str], threads: int, share: float) -> None:
    from types import SimpleNamespace

    from pomona.spark.resources import fit_spec

    spec = BackboneSpec("w", "d", device="cuda")
    spark: Any = SimpleNamespace(conf=conf)
    fitted = fit_spec(spec, spark)
    assert fitted.threads == threads
    assert fitted.memory_share == pytest.approx(share)
    conf = {"spark.master": "local[2]", "spark.task.cpus": "1"}
    spark = SimpleNamespace(conf=conf)
    assert fit_spec(replace(spec, device="cpu"), spark).threads == 1


def test_the_extractor_tells_why() -> None:
    extractor = MobileNetV2Extractor(device="cpu", weights="fruits", image_size=SIZE)
    with pytest.raises(RequestError, match="photo 1 of 2 can't be used: empty"):
        extractor.extract_batch([photo(0), b""])
    assert extractor.extract_batch([]).shape == (0, 1280)
    info = extractor.get_model_info()
    assert info["trained"] is True
    assert info["features"] == 1280


def test_features_that_are_not_finite_are_the_weights_fault(
    spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.full((1, 1280), np.nan, np.float32)
    monkeypatch.setattr(extract_module, "load_network", lambda _: lambda _: [rows])
    with pytest.raises(WeightsError, match="not finite"):
        extract_photos([photo(1)], spec)
    with pytest.raises(ValueError, match="shape"):
        feature_column(np.zeros((1, 7), np.float32), np.ones(1, bool))


def test_bytes_and_tables_give_the_same_values(spec: BackboneSpec) -> None:
    """Of every output, to the bit; the rows are those of the photos that can be used."""
    contents = [photo(1, (120, 90)), None, b"text", photo(2)]
    photos = extract_photos(contents, spec)
    (rows,) = extract(iter([batch(*contents)]), spec)
    assert photos.widths == rows["width"].to_pylist() == [120, None, None, 100]
    assert photos.heights == rows["height"].to_pylist() == [90, None, None, 100]
    assert photos.errors == rows["error"].to_pylist() == [None, "unreadable", "not_an_image", None]
    assert photos.outputs["features"].shape == (2, 1280)
    in_place = [None if row is None else row.tolist() for row in photos.by_photo("features")]
    assert in_place == rows["features"].to_pylist()
    assert extract_photos([], spec).outputs["features"].shape == (0, 1280)
