"""Photos that cost more than their bytes say, written by hand: for tests, fuzzing, benchmarks."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    crc = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


@functools.cache
def png(
    width: int, height: int, colour: int = 2, depth: int = 8, *, rotated: bool = False
) -> bytes:
    """A PNG of zeros, complete: deflate makes a thousandth of it."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = bytes(1 + (width * channels * depth + 7) // 8)
    packer = zlib.compressobj(1)
    rows = max(1, (1 << 24) // len(row))
    data = b"".join(
        packer.compress(row * min(rows, height - top)) for top in range(0, height, rows)
    )
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
            png_chunk(b"PLTE", b"\x09\x08\x07") if colour == 3 else b"",
            png_chunk(b"eXIf", exif(6)) if rotated else b"",
            png_chunk(b"IDAT", data + packer.flush()),
            png_chunk(b"IEND", b""),
        )
    )


def exif(orientation: int) -> bytes:
    return b"II*\x00" + struct.pack("<IHHHIII", 8, 1, 0x0112, 3, 1, orientation, 0)


# --- JPEG --------------------------------------------------------------------------------------


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg(
    width: int,
    height: int,
    scans: Sequence[bytes],
    *,
    sof: int = 0xC2,
    components: int = 3,
    before: bytes = b"",
) -> bytes:
    """A JPEG of hand-written scans (`scan`); every component at full size."""
    one_code = bytes([1] + [0] * 15)
    frame = struct.pack(">BHHB", 8, height, width, components)
    frame += b"".join(bytes([n + 1, 0x11, 0]) for n in range(components))
    return b"".join(
        (
            b"\xff\xd8",
            before,
            segment(0xDB, bytes([0]) + bytes([1] * 64)),
            segment(sof, frame),
            segment(0xC4, b"\x00" + one_code + b"\x00"),  # DC: the one code is "no difference"
            segment(0xC4, b"\x10" + one_code + b"\xe0"),  # AC: "end of band", for 2^14 blocks up
            *scans,
            b"\xff\xd9",
        )
    )


def scan(
    components: Sequence[int], first: int, last: int, high_low: int, data: bytes = b""
) -> bytes:
    """A scan of coefficients ``first`` to ``last`` of some components, from 1."""
    body = bytes([len(components)]) + b"".join(bytes([n, 0x00]) for n in components)
    return segment(0xDA, body + bytes([first, last, high_low])) + data


def runs_of_nothing(blocks: int) -> bytes:
    """Entropy-coded data that says "nothing new" of so many blocks, 32,767 at a time."""
    bits = ("0" + "1" * 14) * -(-blocks // 32767)
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")


def progressive(width: int, height: int, scans: int, *, busy: bool = False) -> bytes:
    """A progressive JPEG with so many scans after the first: empty, or each over all blocks."""
    start = [scan((1, 2, 3), 0, 0, 0)]
    if not busy:
        return jpeg(width, height, start + [scan((1,), 1, 63, 0)] * scans)
    data = runs_of_nothing(-(-width // 8) * -(-height // 8))
    start.append(scan((1,), 1, 63, 0x01, data))
    return jpeg(width, height, start + [scan((1,), 1, 63, 0x10, data)] * scans)


def separate_scans(width: int, height: int) -> bytes:
    """A baseline JPEG with a scan for each component: libjpeg holds all coefficients, too."""
    return jpeg(width, height, [scan((n,), 0, 63, 0) for n in (1, 2, 3)], sof=0xC0)


# --- BMP, TIFF, GIF ------------------------------------------------------------------------------


def bmp_rle(width: int, height: int, data: bytes = b"\x00\x01", *, bits: int = 8) -> bytes:
    """A BMP with run lengths; by default it ends at once."""
    palette = bytes(4 << bits)
    offset = 14 + 40 + len(palette)
    return b"".join(
        (
            b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset),
            struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 2 - (bits == 8), 0, 0, 0, 0, 0),
            palette,
            data,
        )
    )


def gif(width: int, height: int, before: bytes = b"") -> bytes:
    """A GIF of 1 pixel, with a frame that is larger, and to be cleared after it was shown."""
    return b"".join(
        (
            b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0),
            before,
            b"!\xf9\x04\x08\0\0\0\0",
            b"," + struct.pack("<HHHHB", 0, 0, width, height, 0),
            b"\x02\x02\x4c\x01\0;",
        )
    )


def tiff(tags: Mapping[int, tuple[int, Sequence[int]]], data: bytes = b"") -> bytes:
    """A little-endian TIFF: tag to (type, values); offsets of ``data`` count from 8."""
    entries, extra = b"", b""
    where = 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, (kind, values) in sorted(tags.items()):
        body = b"".join(struct.pack({1: "<B", 3: "<H", 4: "<I"}[kind], v) for v in values)
        entries += struct.pack("<HHI", tag, kind, len(values))
        if len(body) <= 4:
            entries += body.ljust(4, b"\x00")
        else:
            entries += struct.pack("<I", where + len(extra))
            extra += body
    head = b"II*\x00" + struct.pack("<I", 8 + len(data)) + data
    return head + struct.pack("<H", len(tags)) + entries + bytes(4) + extra


def tiled_tiff(
    width: int, height: int, tile: int, *, compression: int = 8, samples: int = 3
) -> bytes:
    """A TIFF in one tile, larger than the picture."""
    data = zlib.compress(bytes(1000))
    return tiff(
        {
            256: (4, [width]),
            257: (4, [height]),
            258: (3, [8] * samples),
            259: (3, [compression]),
            262: (3, [2]),
            277: (3, [samples]),
            322: (4, [tile]),
            323: (4, [tile]),
            324: (4, [8]),
            325: (4, [len(data)]),
        },
        data,
    )


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Coarse noise, as large as it has to be, made of little."""
    small = np.random.default_rng(3).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    image = Image.fromarray(small[..., :3]) if mode != "RGBA" else Image.fromarray(small)
    return image.resize((width, height), Image.Resampling.BILINEAR).convert(mode)
