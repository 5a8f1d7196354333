"""What docs/mobile.md tells app developers is so."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from pomona.backbone import mobilenet
from pomona.backbone.spec import make_spec
from pomona.backbone.weights import load_weights
from pomona.core.files import write_json
from pomona.export.export import PHONE, export
from pomona.model import artifact, unknown
from pomona.model.head import ANSWER
from pomona.model.recogniser import Recogniser, answer
from pomona.workspace import layout
from tests.conftest import benchmark

pytest.importorskip("sklearn")
from tests.small_model import ABOUT, SIZE, small_head

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "mobile.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.S)


def block(language: str) -> str:
    """The longest block of a language: the snippet."""
    return str(max((text for name, text in BLOCKS if name == language), key=len))


def make(out: Path, method: str = "distance") -> Path:
    """A model of untrained weights, and its export."""
    features = np.random.default_rng(0).random((36, 1280), np.float32)
    payload = make_spec(load_weights("random:0"), image_size=SIZE, device="cpu").payload
    about = {**ABOUT, "preprocessing": mobilenet.preprocessing(SIZE)}
    folder = layout.open_out(out)
    write_json(folder.manifest, {})  # a sign that the folder is Pomona's
    artifact.save_model(folder.model, payload, small_head(features, method), about)
    export(out)
    return out / "export"


# --- names -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("mobile") / "out")


@pytest.fixture
def record(exported: Path) -> dict[str, Any]:
    return dict(json.loads((exported / "export.json").read_text()))


def walk(value: Any, chain: str) -> Any:
    for name in chain.split("."):
        value = value[name]
    return value


def test_input_and_outputs_have_these_names(exported: Path) -> None:
    session = ort.InferenceSession(exported / PHONE, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    outputs = [output.name for output in session.get_outputs()]
    assert (given.name, given.type, given.shape[1:]) == ("image", "tensor(uint8)", [SIZE, SIZE, 3])
    assert 'mapOf("image" to' in block("kotlin")
    assert re.findall(r'found\["(\w+)"\]', block("kotlin")) == outputs
    assert '["image": image], outputNames: ["probabilities", "score"]' in block("swift")
    assert set(re.findall(r'found\["(\w+)"\]', block("swift"))) == set(outputs)
    assert f"const {{ {', '.join(outputs)} }} = await" in block("ts")
    assert "run({ image })" in block("ts")
    for name in ("image", *outputs):
        assert f"`{name}`: " in PAGE


def test_the_keys_of_export_json_exist(record: dict[str, Any]) -> None:
    kotlin = re.findall(r'about\.get\w+\("(\w+)"\)(?:\.get\w+\("(\w+)"\))?', block("kotlin"))
    assert [".".join(filter(None, chain)) for chain in kotlin] == [
        "labels",
        "unknown.threshold",
        "preprocessing.image_size",
    ]
    swift = re.findall(r"(?<!self\.)\bexport\.((?:[a-z_]+\.)*[a-z_]+)", block("swift"))
    scripts = re.findall(r"\babout\.((?:[a-z_]+\.)*[a-z_]+)", block("js") + block("ts"))
    assert len(set(swift)) == len(set(scripts)) == 3
    for chain in [*swift, *scripts, *(".".join(filter(None, chain)) for chain in kotlin)]:
        walk(record, chain)
    for chain in ("preprocessing.image_size", "unknown.threshold", "model.version", "format"):
        assert f"`{chain}`" in PAGE
        walk(record, chain)
    assert 'files["phone.onnx"].sha256' in PAGE
    assert record["files"]["phone.onnx"]["sha256"]
    assert record["format"] == 1, "the page refuses a format above 1"


# --- what the JavaScript does ------------------------------------------------------------------


def run_node(folder: Path, body: str) -> Any:
    if not (node := shutil.which("node")):
        pytest.skip("Node isn't here")
    (folder / "pomona.mjs").write_text(block("js"), encoding="utf-8")
    start = "import { answer, square } from './pomona.mjs'; import fs from 'node:fs';\n"
    (folder / "run.mjs").write_text(f"{start}console.log(JSON.stringify({body}));")
    words = [node, "run.mjs"]
    told = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(told.stdout)


VECTORS = [
    ([0.2, 0.5, 0.3, 0.0], 1.0),
    ([0.25, 0.25, 0.25, 0.25], 1.0),  # ties: the first label
    ([0.1, 0.4, 0.1, 0.4], -2.0),  # the threshold itself is known
    ([0.1, 0.2, 0.3, 0.4], -2.25),
]


def test_the_answer_is_pomonas(exported: Path, tmp_path: Path) -> None:
    labels = ("apple", "cherry", "plum", "tomato")
    about = {"labels": labels, "unknown": {"threshold": -2.0}}
    calls = ", ".join(
        f"answer(new Float32Array({p}), {score}, {json.dumps(about)})" for p, score in VECTORS
    )
    found = Recogniser(make_spec(load_weights("random:0"), device="cpu"), labels, -2.0, "distance")
    for theirs, (p, score) in zip(run_node(tmp_path, f"[{calls}]"), VECTORS, strict=True):
        ours = answer(np.array(p, np.float32), score, found)
        assert theirs["label"] == ours["label"]
        assert [label for label, _ in theirs["nearest"]] == ours["nearest"]
        assert [share for _, share in theirs["nearest"]] == ours["probabilities"]


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(100, 100, 224), (500, 375, 224), (375, 500, 224), (1300, 90, 32), (32, 32, 32), (3, 2, 7)],
)
def test_the_pixels_are_pillows(tmp_path: Path, width: int, height: int, size: int) -> None:
    rng = np.random.default_rng(width)
    pixels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    (tmp_path / "pixels").write_bytes(pixels.tobytes())
    body = f"[...square(fs.readFileSync('pixels'), 4, {width}, {height}, {size})]"
    theirs = np.array(run_node(tmp_path, body), np.uint8).reshape(size, size, 3)
    image = Image.fromarray(pixels[..., :3].copy())
    ours = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(theirs, ours)


def test_tall_pictures_differ_by_one_step_at_most(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (900, 449, 3), dtype=np.uint8)
    (tmp_path / "pixels").write_bytes(pixels.tobytes())
    theirs = run_node(tmp_path, "[...square(fs.readFileSync('pixels'), 3, 449, 900, 224)]")
    ours = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BILINEAR))
    apart = np.array(theirs, np.int64).reshape(ours.shape) - ours
    assert np.abs(apart).max() <= 1


# --- LiteRT: the graph that is converted -------------------------------------------------------


@pytest.mark.parametrize("method", unknown.METHODS)
def test_the_file_in_pytorch_is_the_file(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    replay = benchmark("replay", monkeypatch)
    file = make(tmp_path / "out", method) / PHONE
    image = np.random.default_rng(2).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    wanted = session.run(list(ANSWER), {"image": image})
    with torch.inference_mode():
        found = replay.Replay(file).eval()(torch.from_numpy(image))
    assert tuple(found) == ANSWER
    for ours, theirs in zip(wanted, found.values(), strict=True):
        assert theirs.shape == ours.shape
        np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-4, atol=1e-4)
