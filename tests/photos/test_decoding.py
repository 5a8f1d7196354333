from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pomona.core.schema import ERRORS
from pomona.photos.decoding import MAX_DECODED, decode
from tests.conftest import photo


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def middle(content: bytes, size: int = 32) -> list[int]:
    found = decode(content, size)
    assert found.error is None
    assert found.pixels is not None
    assert found.pixels.shape == (size, size, 3)
    assert found.pixels.dtype == np.uint8
    return [int(v) for v in found.pixels[size // 2, size // 2]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_every_format_ends_as_rgb(kind: str) -> None:
    value = middle(encode(Image.new("RGB", (40, 30), (200, 100, 50)), kind))
    assert np.abs(np.array(value) - (200, 100, 50)).max() <= 6


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (20, 20), 90), "PNG", (90, 90, 90)),
        (Image.new("1", (20, 20), 1), "PNG", (255, 255, 255)),
        (Image.new("LA", (20, 20), (90, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (20, 20), (200, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (20, 20), (200, 0, 0, 128)), "PNG", (227, 127, 127)),
        (Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.new("RGB", (20, 20), (9, 8, 7)).quantize(2), "PNG", (9, 8, 7)),
        (Image.fromarray(np.full((20, 20), 32896, np.uint16)), "PNG", (128, 128, 128)),
        (Image.fromarray(np.full((20, 20), 0.5, np.float32)), "TIFF", (128, 128, 128)),
    ],
)
def test_modes(image: Image.Image, kind: str, expected: tuple[int, int, int]) -> None:
    assert np.abs(np.array(middle(encode(image, kind))) - expected).max() <= 10


def test_transparent_palette_is_laid_onto_white() -> None:
    image = Image.new("P", (20, 20), 0)
    image.putpalette([10, 200, 10] + [0] * 765)
    assert middle(encode(image, "GIF", transparency=0)) == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    """A red left half ends where the EXIF orientation says; width and height stay the file's."""
    pixels = np.zeros((40, 20, 3), np.uint8)
    pixels[:20] = (255, 0, 0)  # the stored photo has red on top
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encode(Image.fromarray(pixels), "PNG", exif=exif), 32)
    assert (found.width, found.height) == (20, 40)
    assert found.pixels is not None
    side = {1: "top", 2: "top", 3: "bottom", 4: "bottom", 5: "left", 6: "right", 7: "right"}
    where = {"top": (4, 16), "bottom": (28, 16), "left": (16, 4), "right": (16, 28)}
    row, column = where[side.get(orientation, "left")]
    assert tuple(found.pixels[row, column]) == (255, 0, 0)


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert middle(content) == [255, 0, 0]


def test_draft_mode_stays_close_to_a_full_decode() -> None:
    content = photo(3, (1920, 1080))
    found = decode(content, 224)
    whole = Image.open(io.BytesIO(content)).convert("RGB").resize((224, 224), Image.Resampling(2))
    assert found.pixels is not None
    difference = np.abs(found.pixels.astype(int) - np.asarray(whole).astype(int))
    assert (found.width, found.height) == (1920, 1080)
    assert difference.mean() < 1.0
    assert difference.max() < 16


def test_a_200_megapixel_jpeg_is_decoded_small() -> None:
    content = encode(Image.new("L", (16320, 12240), 77), "JPEG")
    found = decode(content, 224)
    assert found.error is None
    assert (found.width, found.height) == (16320, 12240)


def test_codes() -> None:
    assert decode(None, 32).error == "unreadable"
    assert decode(b"", 32).error == "empty"
    assert decode(b"a text named .jpg", 32).error == "not_an_image"
    assert decode(b"<svg xmlns='http://www.w3.org/2000/svg'/>", 32).error == "not_an_image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_cut_at_any_byte_is_an_error(kind: str) -> None:
    """For JPEG at every byte. Other formats may end in bytes that hold no pixels."""
    content = photo(1, (24, 24), kind)
    last = len(content) if kind == "JPEG" else len(content) * 3 // 4
    for cut in range(2, last):
        found = decode(content[:cut], 16)
        assert found.error in ("truncated", "not_an_image"), cut
        assert found.pixels is None


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def test_a_decompression_bomb_is_not_decoded() -> None:
    found = decode(png(60_000, 60_000), 32)
    assert found.error == "too_large"
    assert (found.width, found.height) == (60_000, 60_000)
    side = int(MAX_DECODED**0.5)
    assert decode(png(side + 1, side + 1), 32).error == "too_large"
    assert decode(png(100, 100), 32).error == "truncated"


def test_a_file_that_was_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pomona.photos.decoding.MAX_BYTES", 100)
    assert decode(photo(1)[:101], 32).error == "too_large"


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"]),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=20),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_a_photo_or_a_code(kind: str, flips: list[tuple[float, int]]) -> None:
    content = bytearray(photo(2, (24, 24), kind))
    for where, value in flips:
        content[int(where * (len(content) - 1))] = value
    found = decode(bytes(content), 16)
    assert (found.pixels is None) == (found.error is not None)
    assert found.error is None or found.error in ERRORS
