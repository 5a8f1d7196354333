"""Memory and time of decoding, for each format and mode: python benchmarks/decoding.py.

Each photo is decoded in a process of its own, whose peak is read (`tests.photos.peak`). The table
is beside what `pomona.photos.decoding_cost` estimates; its constants come from here.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import common

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.photos import crafted, peak
from tests.photos.crafted import encode, noise, scan


def photos(width: int, height: int) -> dict[str, bytes]:
    """Return photos of one size, by format and mode."""
    size = (width, height)
    rgb, rgba = noise(*size), noise(*size, "RGBA")
    first = scan((1, 2, 3), 0, 0, 0)
    refined = scan((1,), 1, 63, 0x10, b"\x7f\xfe" * 20)
    grey = np.full((height, width), 40_000, np.uint16)
    return {
        "JPEG": encode(rgb, "JPEG", quality=95),
        "JPEG, progressive": encode(rgb, "JPEG", progressive=True),
        "JPEG, progressive, 4:4:4": encode(rgb, "JPEG", progressive=True, subsampling=0),
        "JPEG, 50 scans": crafted.progressive(*size, 50, busy=True),
        "JPEG, arithmetic, 50 scans": crafted.jpeg(*size, [first] + [refined] * 50, sof=0xCA),
        "PNG, RGB": encode(rgb, "PNG", compress_level=1),
        "PNG, RGB, turned": crafted.png(*size, 2, rotated=True),
        "PNG, RGBA, turned": crafted.png(*size, 6, rotated=True),
        "PNG, 16 bits of grey": crafted.png(*size, 0, 16),
        "WebP": encode(rgb, "WEBP", method=0),
        "WebP, RGBA": encode(rgba, "WEBP", method=0),
        "WebP, lossless, RGBA": encode(rgba, "WEBP", method=0, lossless=True),
        "GIF": encode(rgb, "GIF"),
        "BMP": encode(rgb, "BMP"),
        "BMP, RLE4": crafted.bmp_rle(*size, b"\xff\x01" * (width * height // 255), bits=4),
        "TIFF": encode(rgb, "TIFF"),
        "TIFF, LZW": encode(rgb, "TIFF", compression="tiff_lzw"),
        "TIFF, float, deflate": encode(
            Image.fromarray(grey.astype(np.float32)), "TIFF", compression="tiff_deflate"
        ),
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--width", type=int, default=4000)
    parser.add_argument("--height", type=int, default=2000)
    given = parser.parse_args()
    pixels = given.width * given.height
    with tempfile.TemporaryDirectory() as folder:
        taken = peak.measure(photos(given.width, given.height), Path(folder))
    rows = [
        (
            name,
            f"{one.memory / pixels:.1f}",
            f"{one.estimated_memory / pixels:.1f}",
            f"{1e9 * one.seconds / pixels:.0f}",
            f"{1e9 * one.estimated_seconds / pixels:.0f}",
            one.error or "",
        )
        for name, one in taken.items()
    ]
    common.write_figures(given.json, {name: one._asdict() for name, one in taken.items()})
    heads = ("", "bytes a pixel", "estimated", "ns a pixel", "estimated", "")
    print(common.table(heads, rows))


if __name__ == "__main__":
    main()
