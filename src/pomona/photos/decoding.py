"""Decoding: from a file's bytes to upright RGB pixels of one size, or an error code.

Runs on workers.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import GifImagePlugin, Image, ImageOps

from pomona.core.schema import EMPTY, NOT_AN_IMAGE, TOO_LARGE, TRUNCATED, UNREADABLE
from pomona.photos.decoding_cost import TOO_MUCH, Cost, Header, of_pixels, read_header
from pomona.photos.source import MAX_BYTES

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF")
"""The decoders that Pillow may use. The one for JPEG also opens MPO, which some phones write."""

MAX_DECODED = 64_000_000
"""Largest number of pixels to decode, to bound a worker's memory and time."""

MEMORY = 10
"""Bytes of memory that decoding may take for each pixel of the limit: 640 MB, beside the file."""

SECONDS = 125e-9
"""Seconds that it may take for each pixel of the limit, by `pomona.photos.decoding_cost`: 8."""

LEAST = 16_000_000
"""Pixels to which `MEMORY` and `SECONDS` apply at least: large JPEGs pass a low limit as well."""

STRIP = 1 << 17
"""Pixels to convert at a time, where a conversion takes more memory than its result."""

MAX_JPEG = 256_000_000
"""Largest number of pixels in a JPEG's header: draft mode decodes a phone's 200 MP at 1/8."""

SIGNATURES = (
    b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"
)  # fmt: skip

# Pillow only warns up to twice its limit. Ours is checked before any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None

Pixels = npt.NDArray[np.uint8]


class Photo(NamedTuple):
    """A decoded photo: either ``pixels`` or ``error`` is None."""

    pixels: Pixels | None  # [size, size, 3], RGB
    width: int | None  # pixels, as the file says
    height: int | None
    error: str | None


def decode(content: bytes | None, size: int, most: int = MAX_DECODED) -> Photo:
    """Decode a photo and stretch it to a square, with Pillow's bilinear filter.

    Grey, palette, 16-bit, CMYK and transparent (onto white) photos become RGB; EXIF rotation is
    applied; an animation counts as its first frame. A JPEG more than twice as large as needed is
    decoded at a half, a quarter or an eighth of its size (libjpeg's scaled inverse DCT).

    Parameters
    ----------
    content
        The file's bytes; None if they could not be read.
    size
        Side of the square, in pixels.
    most
        Largest number of pixels to decode; a photo with more is ``too_large``, and so is one that
        would take more than `MEMORY` or `SECONDS` for each of them. A JPEG's file may have up to
        `MAX_JPEG`, unless it is progressive.

    Returns
    -------
    Photo
        With an error code if the bytes are no usable photo; no exception is raised.
    """
    if content is None:
        return Photo(None, None, None, UNREADABLE)
    if not content:
        return Photo(None, None, None, EMPTY)
    if len(content) > MAX_BYTES:
        return Photo(None, None, None, TOO_LARGE)
    header = read_header(content)
    if not _fits(header.cost, most):
        return Photo(None, None, None, TOO_LARGE)
    try:
        image = _open(content)
        width, height = image.size
    except Exception:  # noqa: BLE001 - Pillow's readers raise nearly any type on damaged headers
        return Photo(None, None, None, TRUNCATED if _looks_known(content) else NOT_AN_IMAGE)
    try:
        if not _fits(_prepare(image, header, content, size, most), most):
            return Photo(None, width, height, TOO_LARGE)
        image.load()
        square = upright_rgb(image).resize((size, size), Image.Resampling.BILINEAR)
    except Exception:  # noqa: BLE001 - nearly any type, for damaged pixel data
        return Photo(None, width, height, TRUNCATED)
    finally:
        image.close()
    return Photo(np.asarray(square), width, height, None)


class _FirstFrame(GifImagePlugin.GifImageFile):
    """A GIF of which the first frame counts: nothing is prepared for what follows it.

    Pillow would fill an area as large as the frame when it opens the file, up to 65,535².
    """

    disposal_method = property(lambda self: 0, lambda self, method: None)


def _open(content: bytes) -> Image.Image:
    file = io.BytesIO(content)
    return _FirstFrame(file) if content.startswith(b"GIF8") else Image.open(file, formats=FORMATS)


def pixel_size(content: bytes) -> tuple[int, int] | None:
    """Return a photo's width and height, as its header says; None if that can't be read."""
    if not _fits(read_header(content).cost, MAX_DECODED):
        return None
    try:
        with _open(content) as image:
            return image.size
    except Exception:  # noqa: BLE001 - as in `decode`
        return None


def estimate(content: bytes, size: int, most: int = MAX_DECODED) -> Cost:
    """Return what decoding a file will cost, before it is decoded; nothing if it is refused."""
    header = read_header(content)
    if not _fits(header.cost, most):
        return Cost(0, 0.0)
    try:
        with _open(content) as image:
            cost = _prepare(image, header, content, size, most)
    except Exception:  # noqa: BLE001 - as in `decode`
        return header.cost
    return cost if _fits(cost, most) else Cost(0, 0.0)


def _prepare(image: Image.Image, header: Header, content: bytes, size: int, most: int) -> Cost:
    """Choose the fraction at which a JPEG is decoded, and return what decoding costs."""
    width, height = image.size
    is_jpeg = image.format in ("JPEG", "MPO")
    if width * height > (MAX_JPEG if is_jpeg and header.one_scan else most):
        return TOO_MUCH
    if is_jpeg and min(width, height) > 2 * size:
        # Twice the size needed leaves work to the bilinear filter: results stay close to those
        # of decoding at full size.
        image.draft(None, (2 * size, 2 * size))
    if image.size[0] * image.size[1] > most:
        return TOO_MUCH
    return header.cost.plus(*of_pixels(image, content, size))


def _fits(cost: Cost, most: int) -> bool:
    pixels = max(most, LEAST)
    return cost.memory <= MEMORY * pixels and cost.seconds <= SECONDS * pixels


def _looks_known(content: bytes) -> bool:
    return content.startswith(SIGNATURES) or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return the image as RGB, rotated as its EXIF tag says, transparency laid onto white."""
    if image.getexif().get(0x0112, 1) != 1:  # the Orientation tag
        ImageOps.exif_transpose(image, in_place=True)  # a copy would keep both in memory
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image)
    if image.has_transparency_data:
        return _by_strips(image, _onto_white)
    return image.convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[tuple[int, int, int, int], Image.Image]]:
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        yield box, image.crop(box)


def _by_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert an image to RGB strip by strip: whole, the steps between would take memory too."""
    rgb = Image.new("RGB", image.size)
    for box, strip in _strips(image):
        rgb.paste(convert(strip), box)
    return rgb


def _onto_white(strip: Image.Image) -> Image.Image:
    layer = strip.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and float grey to 8 bits; Pillow's own conversion clips at 255."""
    top = max(float(np.asarray(strip).max(initial=0.0)) for _, strip in _strips(image))
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0, float(2**31 - 1))
    full = next((scale for scale in scales if top <= scale), top)

    def convert(strip: Image.Image) -> Image.Image:
        grey = np.asarray(strip).astype(np.float64)
        scaled = np.clip(np.round(grey * (255.0 / full)), 0, 255)
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")

    return _by_strips(image, convert)
