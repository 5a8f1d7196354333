"""What a photo costs to decode, from its headers alone: upper bounds of memory and time.

Runs on workers.

A file of a few bytes can claim millions of pixels, scans or tags. `read_header` walks a file's
structure in bounded time before Pillow opens it, since Pillow and libjpeg do work, and hold memory,
for every segment, chunk, tag and scan. `of_pixels` adds what decoding and converting its pixels
takes. The figures were measured with ``benchmarks/decoding.py``; a test holds them to the memory of
a child process.
"""

from __future__ import annotations

import math
import re
import struct
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

BASE = 8_000_000
"""Bytes of memory for any photo: the decoder's tables, strips that are converted, its square."""

BYTE = 20e-9
"""Seconds for a byte of compressed data, at most; 8 for JPEG at its highest quality."""

MOST_PARTS = 50_000
"""Segments or chunks that are looked at. A PNG of 128 MB in the usual 8 KB has 16,000."""

PART = 8e-6
"""Seconds that Pillow takes for each, in Python; it takes 80 bytes, too."""

SCAN, ARITHMETIC = 1.3e-9, 4e-9
"""Seconds for a pixel in each scan of a progressive JPEG, Huffman or arithmetic coding."""

PIXEL = {"JPEG": 30e-9, "MPO": 30e-9, "WEBP": 110e-9, "GIF": 70e-9, "TIFF": 80e-9}
"""Seconds for a decoded pixel, conversion and resizing included; others: `OTHER_PIXEL`."""

OTHER_PIXEL = 50e-9

WEBP_LOSSY, WEBP_LOSSLESS = 8, 14
"""Bytes for a pixel that libwebp holds: its canvas, the one of the frame before, its planes."""

RUN, RUN_PIXEL = 450e-9, 400e-9
"""Seconds for a byte and a pixel of a BMP with run lengths, which Pillow decodes in Python."""


class Cost(NamedTuple):
    """Memory beside the file's own bytes, and time on one core of the machine in docs/log.md."""

    memory: int  # bytes
    seconds: float

    def plus(self, memory: float = 0, seconds: float = 0.0) -> Cost:
        """Return the cost with more of both."""
        return Cost(self.memory + int(memory), self.seconds + seconds)


TOO_MUCH = Cost(1 << 62, math.inf)


class Header(NamedTuple):
    """What a file's structure says before Pillow has opened it."""

    cost: Cost
    one_scan: bool = False  # a JPEG that libjpeg decodes row by row, at a fraction of its size


def read_header(content: bytes) -> Header:
    """Walk the structure of a file of any kind; `TOO_MUCH` if it has no end within bounds."""
    cost = Cost(BASE, BYTE * len(content))
    if content.startswith(b"\xff\xd8\xff"):
        return _jpeg(content, cost)
    if content.startswith(b"\x89PNG"):
        return Header(_png(content, cost))
    if content[:4] in (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"):
        return Header(_tiff(content, cost))
    if content.startswith(b"GIF8"):
        return Header(_gif(content, cost.plus(3 * len(content))))  # its comments may be all of it
    if content.startswith(b"RIFF"):
        return Header(cost.plus(2 * len(content)))  # libwebp's copy
    return Header(cost)


def of_pixels(image: Image.Image, content: bytes, size: int) -> Cost:
    """Return the cost of decoding an opened image and making it a square of ``size`` pixels.

    For a JPEG, after `Image.draft`: its pixels are those that come out of libjpeg.
    """
    width, height = image.size
    pixels = width * height
    stored = {"1": 1, "L": 1, "P": 1, "I;16": 2}.get(image.mode.partition("B")[0], 4)
    converted = image.mode != "RGB" or "transparency" in image.info
    # Rotation comes first, and needs a copy; conversion then adds RGB, which takes 4 bytes.
    each = max(2 * stored, stored + 4 * converted)
    # Pillow's resize holds weights for every pixel of a side, and a photo of which one side has
    # its new length already. Pillow 13.0 was seen to take the smaller of the two; none promises it.
    sides = 4 * size * max(width, height) + 32 * (width + height)
    rows = 4 * 8 * width  # of 16-bit RGBA
    cost = Cost(each * pixels + sides + rows, PIXEL.get(image.format or "", OTHER_PIXEL) * pixels)
    codecs = {tile.codec_name for tile in getattr(image, "tile", ())}
    if image.format == "WEBP":
        return cost.plus((WEBP_LOSSLESS if b"VP8L" in content else WEBP_LOSSY) * pixels)
    if "libtiff" in codecs:
        return _libtiff(image, content, cost)
    if "bmp_rle" in codecs:
        return cost.plus(3 * pixels, RUN * len(content) + RUN_PIXEL * pixels)
    return cost


# --- JPEG ----------------------------------------------------------------------------------------

_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_WITHOUT_BODY = {0x00, 0x01, *range(0xD0, 0xD9)}
_FILL = re.compile(rb"\xff+")
_PARSED = {0xDB: 0.2e-6, 0xED: 0.2e-6}
"""Seconds for a byte of the segments that Pillow takes apart in Python: DQT, and Photoshop's."""

JUNK = 0.2e-6
"""Seconds for a byte between segments, which Pillow skips one by one."""


def _jpeg(content: bytes, cost: Cost) -> Header:
    """Walk the segments up to the first scan (ITU-T T.81, annex B)."""
    where, exif, components, pixels, coefficients = 2, 0, 0, 0, 0
    progressive = arithmetic = False
    for _ in range(MOST_PARTS):
        found = _FILL.search(content, where)
        if found is None or found.end() == len(content):
            return Header(cost.plus(seconds=JUNK * (len(content) - where)))
        cost = cost.plus(160, PART + JUNK * (found.end() - 1 - where))
        marker, where = content[found.end()], found.end() + 1
        if marker in _WITHOUT_BODY:
            continue
        if marker == 0xDA:
            break
        length = max(2, int.from_bytes(content[where : where + 2], "big"))
        cost = cost.plus(2 * length, _PARSED.get(marker, 0.0) * length)
        if marker == 0xE1:  # Pillow joins the parts of EXIF, again with each
            exif += length
            cost = cost.plus(seconds=1.5e-9 * exif)
        if marker in _FRAMES:
            frame = _frame(content[where + 2 : where + length])
            components, pixels = max(components, frame[0]), max(pixels, frame[1])
            coefficients = max(coefficients, frame[2])
            progressive |= marker & 3 == 2
            arithmetic |= marker > 0xC8
        where += length
    else:
        return Header(TOO_MUCH)
    # The scan's number of components is two bytes on: fewer than the frame's mean several scans.
    if not progressive and content[where + 2 : where + 3] >= bytes([components]):
        each = ARITHMETIC if arithmetic else 0.0
        return Header(cost.plus(seconds=(4e-9 + each) * pixels), one_scan=True)
    # libjpeg then holds all coefficients, and goes over all of them in every scan.
    scans = content.count(b"\xff\xda")
    each = ARITHMETIC if arithmetic else SCAN
    return Header(cost.plus(coefficients, scans * (1e-6 + each * pixels) + 12e-9 * pixels))


def _frame(body: bytes) -> tuple[int, int, int]:
    """Return a frame's components, its pixels, and its coefficients' bytes: whole MCUs of int16."""
    if len(body) < 6:
        return 0, 0, 0
    _, height, width, count = struct.unpack(">BHHB", body[:6])
    factors = [(max(1, f >> 4), max(1, f & 15)) for f in body[7 : 6 + 3 * count : 3]]
    across = math.ceil(width / (8 * max((h for h, _ in factors), default=1)))
    down = math.ceil(height / (8 * max((v for _, v in factors), default=1)))
    blocks = across * down * sum(h * v for h, v in factors)
    return count, width * height, 2 * 64 * blocks


# --- PNG -----------------------------------------------------------------------------------------

_INFLATED = (b"iCCP", b"zTXt", b"iTXt")


def _png(content: bytes, cost: Cost) -> Cost:
    """Walk the chunks; three kinds Pillow inflates, to a megabyte each."""
    where, inflated = 8, 0
    for _ in range(MOST_PARTS):
        kind = content[where + 4 : where + 8]
        if len(kind) < 4:
            return cost.plus(min(64, inflated) << 20, 4e-3 * inflated)
        length = int.from_bytes(content[where : where + 4], "big")
        cost = cost.plus(160, PART)
        if kind != b"IDAT":
            cost = cost.plus(2 * min(length, len(content)))
            inflated += kind in _INFLATED
        where += 12 + length
    return TOO_MUCH


# --- GIF -----------------------------------------------------------------------------------------

_BLOCK = re.compile(rb"[!,;]")


def _gif(content: bytes, cost: Cost) -> Cost:
    """Walk the blocks before the first frame, in exactly the steps that Pillow takes."""
    where, steps = 13, 0
    if content[10:11] >= b"\x80":  # a palette
        where += 6 << (content[10] & 7)

    def data() -> bytes:
        nonlocal where, steps
        length = content[where : where + 1] or b"\0"
        block = content[where + 1 : where + 1 + length[0]]
        where, steps = where + 1 + length[0], steps + 1
        return block

    while steps < MOST_PARTS:
        found = _BLOCK.search(content, where)
        cost = cost.plus(seconds=JUNK * ((found.start() if found else len(content)) - where))
        if found is None or found[0] != b"!":
            return cost.plus(seconds=PART / 4 * steps)
        label, where, steps = content[found.end() : found.end() + 1], found.end() + 1, steps + 1
        block = data()
        if label == b"\xff" and block.startswith(b"NETSCAPE2.0"):
            data()
        if label != b"\xfe" or block:  # an empty comment ends at once; other labels go on
            while steps < MOST_PARTS and data():
                pass
    return TOO_MUCH


# --- TIFF ----------------------------------------------------------------------------------------

_UNITS = np.array([0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8] + [0] * 237)
"""Bytes of a value by its type (TIFF 6.0, section 2; BigTIFF)."""

_PLACES = (273, 279, 324, 325)
"""Offsets and lengths of strips and tiles: Pillow makes a tuple and a record of each."""


def _tiff(content: bytes, cost: Cost) -> Cost:
    """Add up the tags of the first directory, which Pillow reads into Python."""
    order = "<" if content[:2] == b"II" else ">"
    big = 43 in content[2:4]
    entry = np.dtype(
        [
            ("tag", order + "u2"),
            ("kind", order + "u2"),
            ("count", order + ("u8" if big else "u4")),
            ("value", "S8" if big else "S4"),
        ]
    )
    byteorder: Literal["little", "big"] = "little" if order == "<" else "big"
    start = int.from_bytes(content[8:16] if big else content[4:8], byteorder)
    head = 8 if big else 2
    number = int.from_bytes(content[start : start + head], byteorder)
    room = (len(content) - start - head) // entry.itemsize
    tags = np.frombuffer(content, entry, max(0, min(number, room)), min(start + head, len(content)))
    counts = np.minimum(tags["count"].astype(np.float64), len(content))
    bytes_ = float((counts * _UNITS[np.minimum(tags["kind"], 255)]).sum())
    places = float(counts[np.isin(tags["tag"], _PLACES)].sum())
    cost = cost.plus(2 * bytes_ + 40 * counts.sum(), 0.1e-6 * counts.sum() + PART * len(tags))
    return cost.plus(140 * places, 7e-6 * places)


def _libtiff(image: Image.Image, content: bytes, cost: Cost) -> Cost:
    """Add what libtiff holds: a strip or a tile, which may be larger than the picture."""
    tags = getattr(image, "tag_v2", {})
    width, height = image.size

    def number(tag: int, default: int) -> int:
        value = tags.get(tag, default)
        return value if isinstance(value, int) and value > 0 else default

    across, down = number(322, width), number(323, min(height, number(278, height)))
    samples = number(277, 1)
    bits = tags.get(258, (8,))
    deepest = max(bits) if isinstance(bits, tuple) else bits
    held = across * down
    tiles = math.ceil(width / across) * math.ceil(height / down)
    # Photos in YCbCr pass through RGBA. A JPEG inside may be progressive, as a file of its own.
    memory = (4 + max(4, samples * deepest / 8)) * held
    scans = content.count(b"\xff\xda") if number(259, 1) == 7 else 0
    if scans > tiles:
        memory += 2 * samples * held
    return cost.plus(memory, (10e-9 * tiles + SCAN * scans) * held)
