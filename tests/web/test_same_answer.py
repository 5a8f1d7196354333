"""Same photo, same answer: the page on the device, the service and Python."""

from __future__ import annotations

import base64
import importlib.util
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pomona.model.artifact import Model
from pomona.photos import decoding
from pomona.photos.synthetic import render
from tests.conftest import browser_lacks, photo
from tests.trained_model import make_model
from tests.web.visitor import STRANGE, Served, encoded, needs_runtime, python_says, serve

if importlib.util.find_spec("sklearn") is None:
    browser_lacks("no scikit-learn here")

PIXELS = """async ([content, size]) => {
  const { pixelsOf } = await import('./pixels.js');
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const pixels = await pixelsOf(new Blob([bytes]), size);
  let text = '';
  for (let at = 0; at < pixels.length; at += 8192) {
    text += String.fromCharCode(...pixels.subarray(at, at + 8192));
  }
  return btoa(text);
}"""


def kinds() -> dict[str, tuple[bytes, int]]:
    """Photos of many kinds, and the largest difference that is allowed: 8-bit rounding."""
    image = Image.open(io.BytesIO(photo(7, (333, 217))))
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "jpeg": (encoded(image, quality=95), 0),
        "enlarged": (photo(8, (20, 31)), 0),
        "png": (encoded(image, "PNG"), 0),
        "grey": (encoded(image.convert("L"), "PNG"), 0),
        "palette": (encoded(image.convert("P"), "PNG"), 0),
        "transparent": (encoded(alpha, "PNG"), 2),
        "turned": (encoded(image, exif=turned.tobytes()), 0),
        "progressive": (encoded(image, progressive=True), 0),
        "bmp": (encoded(image, "BMP"), 0),
        "gif": (encoded(image.convert("P"), "GIF"), 0),
        "webp": (encoded(image, "WEBP", lossless=True), 0),
        "large jpeg": (photo(9, (1920, 1080)), 4),
        "tall": (encoded(image.resize((60, 2900)), "PNG"), 0),
    }


def test_pixels_are_pythons(served: Served, visit: Any) -> None:
    visitor = visit(served.url)
    for name, (content, most) in kinds().items():
        encoded_pixels = visitor.page.evaluate(PIXELS, [base64.b64encode(content).decode(), 224])
        pixels = np.frombuffer(base64.b64decode(encoded_pixels), np.uint8).reshape(224, 224, 3)
        wanted = decoding.decode(content, 224).pixels
        assert wanted is not None
        assert np.abs(pixels.astype(int) - wanted).max() <= most, name


Trained = tuple[Model, list[bytes]]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model trained on rendered photos, and others; it needs no data that isn't here."""
    fruits = ("Apple Red 1", "Banana", "Plum")
    drawn = {
        label: [encoded(render(label, frame), quality=90) for frame in range(0, 360, 9)]
        for label in fruits
    }
    known = [(content, label) for label, contents in drawn.items() for content in contents[::2]]
    contents, labels = map(list, zip(*known, strict=True))
    others = [content for contents in drawn.values() for content in contents[1::2]]
    folder = tmp_path_factory.mktemp("rendered-model") / "model"
    return make_model(folder, "fruits", contents, labels, 224), [*others, STRANGE]


@pytest.fixture(scope="module")
def real(
    real_photos: Path, real_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """A model trained on 150 real photos, and 200 others."""
    drawn = random.Random(0).sample(sorted(real_photos.rglob("*.jpg")), 350)
    contents = [path.read_bytes() for path in drawn]
    labels = [path.relative_to(real_photos).parts[1] for path in drawn]
    folder = tmp_path_factory.mktemp("real-model") / "model"
    return make_model(folder, str(real_weights), contents[:150], labels[:150], 224), contents[150:]


SAYS = """async ([kind, contents]) => {
  const { recognise } = await import(`./${kind}.js`);
  const found = [];
  for (const content of contents) {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    const file = new File([bytes], 'photo.jpg', { type: 'image/jpeg' });
    found.push((await (kind === 'device' ? recognise(file) : recognise(file, null))).answer);
  }
  return found;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("photos", ["rendered", "real"])
def test_same_photo_same_answer(photos: str, request: pytest.FixtureRequest, visit: Any) -> None:
    """Rendered photos are everywhere: with a browser, this is never left out."""
    needs_runtime()
    model, contents = request.getfixturevalue(photos)
    sent = [base64.b64encode(content).decode() for content in contents]
    with serve(model) as served:
        visitor = visit(served.url)
        visitor.on_device()
        answers = {
            kind: visitor.page.evaluate(SAYS, [kind, sent]) for kind in ("device", "service")
        }
    rows = python_says(model, contents)
    differences = {}
    for kind, said in answers.items():
        assert len(said) == len(rows) == len(contents)
        for ours, theirs in zip(rows, said, strict=True):
            for name in ("label", "unknown", "reason", "error"):
                assert theirs[name] == ours[name], kind
            assert [near["label"] for near in theirs["nearest"]] == ours["nearest"], kind
        differences[kind] = max(
            abs(p - near["probability"])
            for ours, theirs in zip(rows, said, strict=True)
            for p, near in zip(ours["probabilities"], theirs["nearest"], strict=True)
        )
    assert max(differences.values()) < 0.02
    assert len({row["label"] for row in rows}) == 4  # three fruit, and unknown ones
