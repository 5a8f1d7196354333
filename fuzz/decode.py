"""Fuzz `pomona.photos.decoding.decode`: any bytes give a photo or a code, within its limits."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from harness import ROOT, atheris, fuzz

with atheris.instrument_imports(include=["PIL", "pomona.photos"]):
    from pomona.core.schema import ERRORS
    from pomona.photos import decoding
from PIL import Image
from tests.photos import crafted

MOST = 4_000_000
"""Pixels that may be decoded. The rules scale with it; a small one is sooner reached."""

SLACK = 16_000_000
"""Bytes that the interpreter and its allocator may take beside what is estimated."""

SECONDS = 10.0
"""Of CPU, with Pillow's Python instrumented; the limit is 2 s."""


def target(content: bytes) -> None:
    """Decode, and compare what it took with what is promised and with what was estimated."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = _peak(), time.process_time()
    photo = decoding.decode(content, 96, MOST)
    taken, seconds = _peak() - before, time.process_time() - start
    assert (photo.pixels is None) == (photo.error is not None)
    assert photo.error is None or photo.error in ERRORS
    if photo.pixels is not None:
        assert photo.pixels.shape == (96, 96, 3)
    estimated = decoding.estimate(content, 96, MOST)
    allowed = max(estimated.memory, decoding.MEMORY * MOST * (photo.error is not None))
    assert taken <= allowed + SLACK, f"{taken} bytes for {allowed}"
    assert seconds <= SECONDS, f"{seconds} s, estimated {estimated.seconds}"


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: fuzz on Linux")


def seeds() -> Iterator[bytes]:
    """Return small photos of every format and mode, the crafted ones, and real ones if there."""
    for mode in ("RGB", "RGBA", "L", "P", "CMYK", "1", "F", "I;16"):
        grey = mode in ("F", "I;16")
        image = Image.new(mode, (40, 30), 9) if grey else crafted.noise(40, 30, "RGB").convert(mode)
        for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
            for options in _options(kind):
                try:
                    yield crafted.encode(image, kind, **options)
                except (OSError, ValueError, KeyError):  # the format lacks the mode
                    continue
    yield crafted.encode(
        crafted.noise(40, 30), "MPO", save_all=True, append_images=[image.convert("L")]
    )
    yield crafted.progressive(64, 64, 3, busy=True)
    yield crafted.separate_scans(64, 64)
    for sof in (0xC1, 0xC3, 0xC9, 0xCA):
        yield crafted.jpeg(32, 32, [crafted.scan((1, 2, 3), 0, 63, 0, bytes(40))], sof=sof)
    for bits in (4, 8):
        yield crafted.bmp_rle(
            20, 20, b"\x05\x01\x00\x00\x00\x05abcde\x00\x00\x02\x01\x01\x00\x01", bits=bits
        )
    for compression in (1, 5, 7, 8, 32773, 34925, 50000):
        yield crafted.tiled_tiff(40, 40, 32, compression=compression)
    real = ROOT.parent / "shared" / "data"
    photos = sorted(path for path in real.glob("**/*.jp*g") if path.stat().st_size < 65536)
    for path in photos[:: max(1, len(photos) // 50)]:
        yield path.read_bytes()


def _options(kind: str) -> list[dict[str, object]]:
    rotated = {"exif": crafted.exif(6)}
    return {
        "JPEG": [{}, {"progressive": True}, rotated],
        "PNG": [{}, rotated],
        "WEBP": [{}, {"lossless": True}, rotated],
        "TIFF": [
            {"compression": name}
            for name in (None, "tiff_deflate", "tiff_lzw", "packbits", "jpeg", "group4", "zstd")
        ],
    }.get(kind, [{}])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    Image.new("RGB", (8, 8)).resize((4, 4))
    fuzz(target, seeds(), rss_mb=1024)
