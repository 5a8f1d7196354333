"""What a phone's way to 224×224 does to the answers, against Pomona's own.

    python benchmarks/resizing.py SOURCE --model OUT/model

Each way is written here in Pillow and NumPy, from what the platforms document; none of it ran on a
phone. Photos: of SOURCE's Test as they are; the same as a camera's 12 megapixels (padded with white
to 4:3, enlarged, with grain, as JPEG), because small photos are only enlarged; and with --others
a folder of photos of other things.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

import common
from pomona.backbone.session import onnx_session
from pomona.core.errors import RequestError
from pomona.model import artifact
from pomona.model.head import ANSWER
from pomona.photos import decoding

CAMERA = (4032, 3024)
GRAIN = 8
"""Standard deviation of the noise that stands for a sensor's, of 255."""

Pixels = npt.NDArray[np.uint8]
Way = Callable[[bytes, int], Pixels]


# --- the ways ----------------------------------------------------------------------------------


def upright(content: bytes, least: int | None = None) -> Image.Image:
    """Decode; with ``least`` a JPEG at 1/2, 1/4 or 1/8, such that no side gets shorter."""
    image = Image.open(io.BytesIO(content))
    if least:
        image.draft(None, (least, least))
    return decoding.upright_rgb(image)


def triangle(image: Image.Image, size: int) -> Pixels:
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def two_by_two(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Mix the four nearest pixels, however far the next ones are: what GPUs call bilinear."""
    width, height = (size, size) if isinstance(size, int) else size
    pixels = np.asarray(image).astype(np.float32)
    rows, down = _places(pixels.shape[0], height)
    pixels = pixels[rows[0]] * (1 - down)[:, None, None] + pixels[rows[1]] * down[:, None, None]
    columns, right = _places(pixels.shape[1], width)
    pixels = pixels[:, columns[0]] * (1 - right)[:, None] + pixels[:, columns[1]] * right[:, None]
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def _places(length: int, size: int) -> tuple[tuple[Any, Any], npt.NDArray[np.float32]]:
    at = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    low = np.floor(at).astype(int)
    return (low, np.minimum(low + 1, length - 1)), (at - low).astype(np.float32)


def halved(image: Image.Image, least: int) -> Image.Image:
    """Halve, each pixel the mean of four, while no side gets shorter than ``least``."""
    while min(image.size) >= 2 * least:
        image = image.reduce(2)
    return image


def bounded(image: Image.Image, longest: int) -> tuple[int, int]:
    scale = min(1, longest / max(image.size))
    return round(image.width * scale), round(image.height * scale)


def thumbnail(content: bytes, size: int) -> Pixels:
    image = upright(content)
    return triangle(image.resize(bounded(image, 4 * size), Image.Resampling.LANCZOS), size)


def scaled(content: bytes, size: int) -> Pixels:
    image = upright(content)
    return triangle(two_by_two(image, bounded(image, 4 * size)), size)


def as_jpeg(content: bytes, size: int, quality: int) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(pomonas(content, size)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def cropped(content: bytes, size: int) -> Pixels:
    image = upright(content, 2 * size)
    return triangle(ImageOps.fit(image, (min(image.size), min(image.size))), size)


def pomonas(content: bytes, size: int) -> Pixels:
    pixels = decoding.decode(content, size).pixels
    if pixels is None:
        raise RequestError("a photo can't be decoded: choose a source whose photos can")
    return pixels


def filtered(kind: Image.Resampling) -> Way:
    return lambda content, size: np.asarray(upright(content, 2 * size).resize((size, size), kind))


def from_p3(pixels: Pixels) -> Pixels:
    """Take the pixels for Display P3 and turn them into sRGB, as a platform may with a photo of P3.

    Both have sRGB's curve (IEC 61966-2-1); the matrix is P3's (SMPTE EG 432-1, D65) to XYZ to sRGB.
    """
    value = pixels / 255
    light = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    matrix = [[1.2249, -0.2249, 0], [-0.0421, 1.0421, 0], [-0.0196, -0.0786, 1.0982]]
    light = np.clip(light @ np.array(matrix).T, 0, 1)
    curve = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.asarray(np.round(255 * curve), np.uint8)


WAYS: dict[str, Way] = {
    "decoded whole, triangle": lambda c, size: triangle(upright(c), size),
    "decoded at 1/n, area": filtered(Image.Resampling.BOX),
    "decoded at 1/n, cubic": filtered(Image.Resampling.BICUBIC),
    "decoded at 1/n, Lanczos": filtered(Image.Resampling.LANCZOS),
    "decoded at 1/n, four nearest": lambda c, n: np.asarray(two_by_two(upright(c, 2 * n), n)),
    "halved, four nearest": lambda c, n: np.asarray(two_by_two(halved(upright(c), n), n)),
    "halved to 448 or more, triangle": lambda c, n: triangle(halved(upright(c), 2 * n), n),
    "Lanczos to 896, triangle": thumbnail,
    "four nearest to 896, triangle": scaled,
    "Display P3 turned into sRGB": lambda c, size: from_p3(pomonas(c, size)),
    "Pomona's, then JPEG 92": lambda c, size: as_jpeg(c, size, 92),
    "decoded whole, four nearest": lambda c, size: np.asarray(two_by_two(upright(c), size)),
    "cropped, not stretched": cropped,
    "rotated by 90 degrees": lambda c, size: np.rot90(pomonas(c, size)),
    "BGR for RGB": lambda c, size: pomonas(c, size)[..., ::-1],
}
"""The last three are mistakes."""


# --- photos ------------------------------------------------------------------------------------


def camera(content: bytes, seed: int) -> bytes:
    image = upright(content)
    wide = ImageOps.pad(image, (round(image.height * 4 / 3), image.height), color="white")
    pixels = np.asarray(wide.resize(CAMERA, Image.Resampling.BICUBIC)).astype(np.float32)
    grain = np.random.default_rng(seed).standard_normal(pixels.shape[:2], np.float32)
    pixels += GRAIN * grain[..., None]
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


# --- figures -----------------------------------------------------------------------------------


def compare(found: artifact.Model, contents: Iterator[bytes]) -> dict[str, dict[str, float]]:
    session = onnx_session(found.content)
    size = int(found.about["preprocessing"]["image_size"])
    threshold = float(found.about["unknown"]["threshold"])
    answers: dict[str, list[tuple[Any, bool]]] = {name: [] for name in ("", *WAYS)}
    for content in contents:
        pixels = [pomonas(content, size), *(way(content, size) for way in WAYS.values())]
        for name, each in zip(answers, pixels, strict=True):
            image = {"image": np.ascontiguousarray(each)[None]}
            probabilities, score = session.run(list(ANSWER), image)
            answers[name].append((probabilities[0], bool(score[0] < threshold)))
    ours = answers.pop("")
    return {name: _figures(ours, theirs) for name, theirs in answers.items()}


def _figures(ours: list[tuple[Any, bool]], theirs: list[tuple[Any, bool]]) -> dict[str, float]:
    p, q = (np.stack([each for each, _ in side]) for side in (ours, theirs))
    apart = np.abs(p - q).max(axis=1)
    unknown = [mine == other for (_, mine), (_, other) in zip(ours, theirs, strict=True)]
    return {
        "largest": float(apart.max()),
        "mean": float(apart.mean()),
        "labels": float((p.argmax(axis=1) == q.argmax(axis=1)).mean()),
        "unknown": float(np.mean(unknown)),
    }


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a local folder of photos")
    parser.add_argument("--model", type=Path, required=True, help="OUT/model")
    parser.add_argument("--photos", type=common.positive, default=200, help="(default: 200)")
    parser.add_argument("--camera", type=common.positive, default=50, help="(default: 50)")
    parser.add_argument("--others", type=Path, metavar="FOLDER", help="photos of other things")
    options = parser.parse_args()
    found = artifact.load_model(options.model)
    small = [path.read_bytes() for path in common.spread(options.source, options.photos)]
    large = common.spread(options.source, options.camera)
    sets: dict[str, tuple[int, Iterator[bytes]]] = {
        "as they are": (len(small), iter(small)),
        "as a camera's": (len(large), (camera(p.read_bytes(), n) for n, p in enumerate(large))),
    }
    if options.others:
        others = [options.others / path for path in common.list_photos(options.others)]
        sets["other things"] = (len(others), (path.read_bytes() for path in others))
    figures = {}
    for name, (count, contents) in sets.items():
        figures[name] = compare(found, contents)
        rows = [[way, *row.values()] for way, row in figures[name].items()]
        common.say(f"\n{count} photos, {name}")
        head = ["way", "largest difference", "mean", "labels same", "unknown same"]
        common.say(common.table(head, rows))
    common.write_figures(options.json, {"resizing": figures})
    return 0


if __name__ == "__main__":
    common.start(main)
