"""What a photo may cost: by memory measured in a child process, and by limits on what it claims."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pomona.photos import decoding_cost
from pomona.photos.decoding import LEAST, MAX_DECODED, MEMORY, SECONDS, decode, estimate
from tests.photos import crafted
from tests.photos.crafted import encode, noise
from tests.photos.peak import measure

COSTLY = {
    "progressive": crafted.progressive(4000, 2000, 2),
    "progressive, CMYK": crafted.jpeg(
        4000, 2000, [crafted.scan((1, 2, 3, 4), 0, 0, 1)], components=4
    ),
    "a scan for each component": crafted.separate_scans(4000, 2000),
    "arithmetic coding": crafted.jpeg(
        4000, 2000, [crafted.scan((1, 2, 3), 0, 0, 0), crafted.scan((1,), 1, 63, 0)], sof=0xCA
    ),
    "CMYK, too slim to be decoded at a fraction": encode(
        noise(20_000, 400, "CMYK"), "JPEG", exif=crafted.exif(6)
    ),
    **{
        f"PNG, colour {colour}, {depth} bits": crafted.png(4000, 2000, colour, depth, rotated=True)
        for colour, depth in ((0, 16), (2, 8), (3, 1), (4, 8), (6, 8), (6, 16))
    },
    "WebP, RGB": encode(noise(2000, 1000), "WEBP", method=0),
    "WebP, RGBA, turned": encode(noise(2000, 1000, "RGBA"), "WEBP", method=0, exif=crafted.exif(6)),
    "WebP, lossless": encode(
        noise(2000, 1000, "RGBA"), "WEBP", method=0, lossless=True, exif=crafted.exif(6)
    ),
    "GIF, transparent": encode(noise(2000, 1000, "P"), "GIF", transparency=0),
    "BMP, run lengths": crafted.bmp_rle(2000, 1000, (b"\xff\x01" * 7 + b"\xd7\x01\0\0") * 1000),
    "BMP, RGBA": encode(noise(2000, 1000, "RGBA"), "BMP"),
    "TIFF, float": encode(Image.fromarray(np.ones((1000, 2000), np.float32)), "TIFF"),
    "TIFF, 16 bits, deflate": encode(
        Image.fromarray(np.full((1000, 2000), 9, np.uint16)), "TIFF", compression="tiff_deflate"
    ),
    "TIFF, RGBA, LZW": encode(noise(2000, 1000, "RGBA"), "TIFF", compression="tiff_lzw"),
    "TIFF, a tile of 4096 for 1 pixel": crafted.tiled_tiff(1, 1, 4096, samples=4),
}


def test_a_photo_takes_no_more_memory_than_its_headers_say(tmp_path: Path) -> None:
    """The interpreter and its allocator have 4 MB."""
    for name, taken in measure(COSTLY, tmp_path).items():
        assert taken.error in (None, "truncated"), name
        assert taken.memory <= taken.estimated_memory + 4_000_000, (name, taken)
        # An estimate far above would refuse photos that are harmless.
        assert taken.memory >= taken.estimated_memory / 4, (name, taken)


def chunks(count: int, chunk: bytes) -> bytes:
    content = crafted.png(10, 10)
    return content[:33] + chunk * count + content[33:]


INFLATES = crafted.png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000)))
ONE_SCAN = [crafted.scan((1, 2, 3), 0, 63, 0, bytes(4))]
STRIPS = {tag: (4, [8] * 700_000) for tag in (273, 279)}

REFUSED = {
    "progressive, 256 megapixels": crafted.progressive(16_000, 16_000, 1),
    "a scan for each component, 256 megapixels": crafted.separate_scans(16_000, 16_000),
    "16 megapixels, 1000 scans": crafted.progressive(4000, 4000, 1000),
    "100,000 empty segments": crafted.jpeg(
        40, 40, ONE_SCAN, sof=0xC0, before=b"\xff\xfe\0\2" * 100_000
    ),
    "junk between segments": crafted.jpeg(
        40, 40, ONE_SCAN, sof=0xC0, before=b"\xff\xfe\0\2" + b"x" * 45_000_000
    ),
    "100,000 chunks": chunks(100_000, crafted.png_chunk(b"tEXt", b"")),
    "chunks that inflate": chunks(3000, INFLATES),
    "one column": crafted.png(1, 4_000_000, 0),
    "a tile of 16384": crafted.tiled_tiff(1, 1, 16_384),
    "700,000 strips": crafted.tiff(
        {256: (4, [100]), 257: (4, [100]), 259: (3, [1]), 262: (3, [1]), 278: (4, [1])} | STRIPS
    ),
    "run lengths of 40 megapixels": crafted.bmp_rle(40_000_000, 1),
    # Found by fuzz/decode.py: Pillow fills an area as large when it opens the file.
    "a frame of 40,000²": crafted.gif(40_000, 40_000),
    "a comment in pieces": crafted.gif(1, 1, b"!\xfe" + b"\1x" * 100_000 + b"\0"),
    "WebP of 16383²": b"".join(
        (
            b"RIFF" + (50).to_bytes(4, "little") + b"WEBPVP8X" + (10).to_bytes(4, "little"),
            bytes(4) + b"\xfe\x3f\0" * 2,
            encode(Image.new("RGB", (16, 16)), "WEBP", lossless=True)[12:],
        )
    ),
}


def test_what_would_cost_too_much_is_refused_and_costs_nothing(tmp_path: Path) -> None:
    for name, taken in measure(REFUSED, tmp_path).items():
        # libwebp itself refuses a frame that isn't as large as the canvas.
        assert taken.error == ("truncated" if "WebP" in name else "too_large"), name
        assert taken.memory <= 8_000_000, (name, taken)
        assert taken.seconds <= 2, name


@pytest.mark.parametrize("most", [1_000_000, 24_000_000, MAX_DECODED])
def test_ordinary_photos_are_within_the_limits(most: int) -> None:
    """64 megapixels of PNG are decoded as before, and so are the 200 of a phone's JPEG."""
    memory, seconds = MEMORY * max(most, LEAST), SECONDS * max(most, LEAST)
    for image, kind, options in ORDINARY:
        if image.width * image.height <= most * (1 if options else 64):
            cost = estimate(encode(image, kind, **options), 224, most)
            assert 0 < cost.memory <= memory, (kind, image.size, cost)
            assert 0 < cost.seconds <= seconds, (kind, image.size, cost)


ORDINARY: list[tuple[Image.Image, str, dict[str, Any]]] = [
    (Image.new("L", (16_320, 12_240)), "JPEG", {}),  # at an eighth
    (Image.new("RGB", (1000, 1000)), "WEBP", {"method": 0}),
    (Image.new("RGB", (1000, 1000)), "TIFF", {"compression": "tiff_lzw"}),
    (Image.new("RGB", (4000, 3000)), "JPEG", {"progressive": True}),
    (Image.new("RGB", (4000, 3000)), "WEBP", {"method": 0}),
    (Image.new("RGB", (8000, 7990)), "PNG", {"compress_level": 1}),
]


def test_an_estimate_of_bytes_that_are_no_photo() -> None:
    for content in (
        b"",
        b"no photo",
        b"\xff\xd8\xff",
        b"\x89PNG",
        b"II*\0",
        b"II+\0\xff\xff\xff\xff",
    ):
        cost = decoding_cost.read_header(content).cost
        assert 0 < cost.memory < 9_000_000
        assert cost.seconds < 0.1
        assert decode(content, 32).error in ("empty", "truncated", "not_an_image")
