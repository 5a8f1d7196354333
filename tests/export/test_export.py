from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from pomona.backbone.session import onnx_session
from pomona.core.errors import RequestError
from pomona.export import judgement
from pomona.export.export import HALF, INT8, PHONE, ExportOptions, export
from pomona.export.judgement import choose
from pomona.model import artifact
from pomona.model.head import ANSWER
from pomona.photos import decoding
from pomona.pipeline import run
from pomona.pipeline.extract import ExtractOptions
from pomona.pipeline.reduce import ReduceOptions
from pomona.pipeline.train import TrainOptions
from tests.conftest import fill, photo

pytest.importorskip("sklearn")

QUICK = ExtractOptions(weights="fruits", image_size=32, device="cpu")
ALL = ExportOptions(int8=True, half=True, calibration=12)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("export")
    source = fill(base / "source", labels=3, each=12)
    reduce = ReduceOptions(8, plots=False)
    run.run(source, base / "out", QUICK, reduce, train_options=TrainOptions())
    return base / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights and 24 photos wouldn't pass."""
    monkeypatch.setattr(judgement, "MOST_DROP", 101)
    monkeypatch.setattr(judgement, "LEAST_AGREEMENT", 0)


def test_the_phone_file_is_the_model(out: Path) -> None:
    record = export(out)
    assert sorted(p.name for p in (out / "export").iterdir()) == ["export.json", PHONE]
    assert record == {
        **json.loads((out / "export/export.json").read_text()),
        "folder": str(out / "export"),
    }
    content = (out / "export" / PHONE).read_bytes()
    assert record["files"][PHONE] == {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["probabilities", "score"]
    pixels = decoding.decode(photo(3), 32).pixels
    assert pixels is not None
    whole = ort.InferenceSession(
        artifact.load_model(out / "model").content, providers=["CPUExecutionProvider"]
    )
    for name in ANSWER:
        (one,), (other,) = (s.run([name], {"image": pixels[None]}) for s in (session, whole))
        np.testing.assert_array_equal(one, other)
    assert not (out / "_work").exists()


def test_smaller_files(out: Path, lenient: None) -> None:
    record = export(out, ALL)
    sizes = {name: about["bytes"] for name, about in record["files"].items()}
    assert sizes[HALF] < 0.6 * sizes[PHONE]
    assert sizes[INT8] < 0.4 * sizes[PHONE]
    names = [row["name"] for row in record["variants"]]
    assert names == ["half", "int8, per channel", "int8, per tensor"]
    assert [row["kept"] for row in record["variants"]].count(True) == 2
    assert record["held_out"] == {"split": "Training", "photos": 24}
    half = record["variants"][0]
    assert half["agreement"] == 1
    proto = onnx.load(out / "export" / INT8)
    kinds = {node.op_type for node in proto.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    session = ort.InferenceSession(out / "export" / HALF, providers=["CPUExecutionProvider"])
    decoded = [decoding.decode(photo(n), 32).pixels for n in range(4)]
    pixels = np.stack([d for d in decoded if d is not None])
    ours, theirs = (
        s.run(["probabilities"], {"image": pixels})[0]
        for s in (session, onnx_session((out / "export" / PHONE).read_bytes()))
    )
    np.testing.assert_allclose(ours, theirs, atol=0.02)


def test_a_refusal_has_both_figures_and_writes_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judgement, "MOST_DROP", -1000)
    with pytest.raises(RequestError) as refused:
        export(out, ALL)
    line = str(refused.value)
    for words in ("half is refused", "int8 is refused", "per channel: accuracy", "per tensor: acc"):
        assert words in line
    assert line.count("labels agree on") == 3
    assert sorted(p.name for p in (out / "export").iterdir()) == ["export.json", PHONE]


def test_the_gate() -> None:
    y = np.zeros(1000, np.int64)
    right, wrong = y.copy(), y.copy()
    wrong[:4] = 1
    assert judgement.judge(right, wrong, y)["passed"] is True  # 0.4 points, 99.6 %
    wrong[:6] = 1
    figures = judgement.judge(right, wrong, y)
    assert figures["passed"] is False
    assert figures["drop_points"] == pytest.approx(0.6)
    other = np.arange(1000) % 50 // 49  # 2 % differ, half of them to the better
    y[::2] = other[::2]
    assert judgement.judge(right, other, y)["agreement"] == pytest.approx(0.98)
    assert judgement.judge(right, other, y)["passed"] is False


def test_another_folder(out: Path, tmp_path: Path) -> None:
    record = export(out, ExportOptions(dest=str(tmp_path / "phone")))
    assert record["folder"] == str(tmp_path / "phone")
    assert (tmp_path / "phone" / PHONE).exists()
    export(out, ExportOptions(dest=str(tmp_path / "phone")))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(RequestError, match="holds other files than an export's"):
        export(out, ExportOptions(dest=str(tmp_path / "full")))


def test_what_cant_be(out: Path, tmp_path: Path, made: Path) -> None:
    with pytest.raises(RequestError, match="there is no"):
        export(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="at least one photo"):
        export(out, replace(ALL, calibration=0))
    table = json.loads((out / "features/_table.json").read_text())
    table["source"] = str(tmp_path / "gone")
    (out / "features/_table.json").write_text(json.dumps(table))
    with pytest.raises(RequestError, match="put the photos back at"):
        export(out, ALL)
    assert export(out)["files"]
    shutil.rmtree(out / "model")
    with pytest.raises(RequestError, match="there is no model"):
        export(out)


def test_photos_are_chosen_once(made: Path) -> None:
    from pomona.workspace.layout import open_out

    calibration, judges = choose(open_out(made), ("Fruit 0", "Fruit 1", "Fruit 2"), 12, 2000)
    assert calibration.split == judges.split == "Training"
    assert not set(calibration.paths) & set(judges.paths)
    assert len(calibration.paths) == 12
    assert set(judges.y) == {0, 1, 2}
