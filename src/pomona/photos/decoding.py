"""Decoding: from a file's bytes to upright RGB pixels of one size, or an error code.

Runs on workers.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from pomona.core.schema import EMPTY, NOT_AN_IMAGE, TOO_LARGE, TRUNCATED, UNREADABLE
from pomona.photos.source import MAX_BYTES

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF")
"""The decoders that Pillow may use. The one for JPEG also opens MPO, which some phones write."""

MAX_DECODED = 64_000_000
"""Largest number of pixels to decode: 256 MB as Pillow holds RGB, to bound a worker's memory."""

STRIP = 1 << 20
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
        Largest number of pixels to decode; a photo with more is ``too_large``. A JPEG's file may
        have up to `MAX_JPEG`.

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
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
    except Exception:  # noqa: BLE001 - Pillow's readers raise nearly any type on damaged headers
        return Photo(None, None, None, TRUNCATED if _looks_known(content) else NOT_AN_IMAGE)
    try:
        is_jpeg = image.format in ("JPEG", "MPO")
        if width * height > (MAX_JPEG if is_jpeg else most):
            return Photo(None, width, height, TOO_LARGE)
        if is_jpeg and min(width, height) > 2 * size:
            # Twice the size needed leaves work to the bilinear filter: results stay close to those
            # of decoding at full size.
            image.draft(None, (2 * size, 2 * size))
        if image.size[0] * image.size[1] > most:
            return Photo(None, width, height, TOO_LARGE)
        image.load()
        square = upright_rgb(image).resize((size, size), Image.Resampling.BILINEAR)
    except Exception:  # noqa: BLE001 - nearly any type, for damaged pixel data
        return Photo(None, width, height, TRUNCATED)
    finally:
        image.close()
    return Photo(np.asarray(square), width, height, None)


def _looks_known(content: bytes) -> bool:
    return content.startswith(SIGNATURES) or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return the image as RGB, rotated as its EXIF tag says, transparency laid onto white."""
    if image.getexif().get(0x0112, 1) != 1:  # the Orientation tag
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.has_transparency_data:
        return _onto_white(image)
    return image.convert("RGB")


def _onto_white(image: Image.Image) -> Image.Image:
    flat = Image.new("RGB", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = (0, top, image.width, min(top + rows, image.height))
        layer = image.crop(strip).convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        flat.paste(Image.alpha_composite(white, layer).convert("RGB"), strip)
    return flat


def _eight_bits(image: Image.Image) -> Pixels:
    """Scale 16-bit, 32-bit and float grey to 8 bits; Pillow's own conversion clips at 255."""
    grey = np.asarray(image)
    top = float(grey.max(initial=0.0))
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0, float(2**31 - 1))
    full = next((scale for scale in scales if top <= scale), top)
    eight_bits = np.empty(grey.shape, np.uint8)
    rows = max(1, STRIP // grey.shape[1])
    for start in range(0, len(grey), rows):
        strip = grey[start : start + rows].astype(np.float64)
        eight_bits[start : start + rows] = np.clip(np.round(strip * (255.0 / full)), 0, 255)
    return eight_bits
