"""Rendered fruit: photos on white, with the folder and file names of Fruits-360.

For demos, tests and benchmarks without a network. A label's surface is a cloud of points
(`pomona.photos.synthetic_shapes`), built once; rendering turns the cloud, keeps the point nearest
to the camera in each pixel, and lights it. That takes about a millisecond a photo.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from pomona.core.cpus import available_cpus
from pomona.core.errors import RequestError
from pomona.photos.synthetic_catalogue import BY_LABEL, LABELS, Array
from pomona.photos.synthetic_shapes import build, spin

_RASTER = 200  # pixels a side, before the reduction to 100 makes the edges soft
_INDEX_BITS = 18  # a cell holds depth in its high bits, a point's number in these: max is z-test
_CHUNK = 240  # photos that a worker renders between two reports: a third of a second


@dataclass(frozen=True)
class Photo:
    """One photo to render.

    ``split`` is "Training" or "Test", ``label`` one of `LABELS`, ``frame`` the turntable's
    position in degrees, 0 to 359, and ``axis`` how the fruit sits on it: "", "r", "r2", "r3", ….
    """

    split: str
    label: str
    frame: int
    axis: str

    @property
    def path(self) -> str:
        """The path below the destination, such as ``Training/Apple Red 1/r_33_100.jpg``."""
        prefix = f"{self.axis}_" if self.axis else ""
        return f"{self.split}/{self.label}/{prefix}{self.frame}_100.jpg"


@lru_cache(maxsize=4)
def _cloud(label: str) -> tuple[Array, Array, Array, Array]:
    """Points, normals, colours, each (3, n), and gloss (n,): float32, within the unit sphere."""
    parts = build(BY_LABEL[label])
    xyz, normal, colour, gloss = (
        np.concatenate([getattr(part, name) for part in parts], axis=-1).astype(np.float32)
        for name in ("xyz", "normal", "colour", "gloss")
    )
    xyz -= (xyz.max(axis=1) + xyz.min(axis=1))[:, None] / 2
    xyz /= np.linalg.norm(xyz, axis=0).max()
    return xyz, normal, colour.clip(0, 1), gloss


def _pose(axis: str, frame: int) -> Array:
    """Return a photo's rotation, (3, 3): how the fruit sits, the turn, the camera's height."""
    index = int(axis[1:] or 1) if axis else 0
    seats = [np.eye(3), spin(0, 90), spin(2, 120)]
    seat = seats[index] if index < 3 else spin(0, 137.5 * index) @ spin(2, 77 * index)
    return np.asarray(spin(0, (28, 18, 40)[index % 3]) @ spin(1, frame) @ seat)


def _dot(row: Array, field: Array) -> Array:
    # Not BLAS, as in `synthetic_shapes`; its threads would also compete with other workers.
    a, b, c = row.astype(np.float32)
    return np.asarray(field[0] * a + field[1] * b + field[2] * c)


def _raster(cell: Array, depth: Array) -> Array:
    """Return the numbers, from 1, of the points nearest to the camera, (200, 200); 0 for none."""
    key = (depth << _INDEX_BITS) | np.arange(1, len(depth) + 1, dtype=np.int32)
    grid = np.zeros((_RASTER, _RASTER), np.int32)
    np.maximum.at(grid.reshape(-1), cell, key)
    wide = grid.copy()  # a point covers 3 x 3 cells, so that the surface has no holes
    np.maximum(wide[:, 1:], grid[:, :-1], out=wide[:, 1:])
    np.maximum(wide[:, :-1], grid[:, 1:], out=wide[:, :-1])
    grid = wide.copy()
    np.maximum(grid[1:], wide[:-1], out=grid[1:])
    np.maximum(grid[:-1], wide[1:], out=grid[:-1])
    return np.asarray(grid & ((1 << _INDEX_BITS) - 1))


def _shade(
    normal: Array, colour: Array, gloss: Array, pose: Array, rng: np.random.Generator
) -> Array:
    """Light each point (Blinn 1977) and add a little noise: (n, 4) uint8."""
    lamp = np.array([-0.45, 0.65, 0.62]) + rng.uniform(-0.08, 0.08, 3)
    lamp /= np.linalg.norm(lamp)
    halfway = lamp + np.array([0, 0, 1])
    halfway /= np.linalg.norm(halfway)
    light = 0.44 + 0.66 * np.maximum(_dot(pose.T @ lamp, normal), 0) + 0.08 * _dot(pose[2], normal)
    light *= 255 * np.float32(rng.uniform(0.96, 1.03))
    light *= 0.97 + 0.06 * rng.random(len(gloss), np.float32)
    spot = np.maximum(_dot(pose.T @ halfway, normal), 0)
    for _ in range(5):
        spot *= spot
    spot *= gloss * 255
    shaded = np.empty((len(gloss), 4), np.uint8)
    for k in range(3):
        shaded[:, k] = np.minimum(colour[k] * light + spot, 254)
    return shaded


def render(
    label: str, frame: int, axis: str = "", *, size: int = 100, seed: int = 0
) -> Image.Image:
    """Render one photo: RGB, white around the fruit.

    ``label``, ``frame`` and ``axis`` are as in `Photo`, ``size`` is in pixels a side (above 200 no
    detail is added). ``seed`` changes light, distance and noise a little; so do label, frame and
    axis. Raises KeyError if there is no such label.
    """
    rng = np.random.default_rng([seed, frame, zlib.crc32(f"{label}/{axis}".encode())])
    cloud, pose = _cloud(label), _pose(axis, frame)
    front = np.flatnonzero(_dot(pose[2], cloud[1]) > 0)
    xyz, normal, colour, gloss = (np.take(field, front, axis=-1) for field in cloud)
    scale = _RASTER * rng.uniform(0.455, 0.475)
    x, y = _dot(pose[0] * scale, xyz), _dot(pose[1] * -scale, xyz)
    column, row = ((p + (_RASTER - p.max() - p.min()) / 2).astype(np.int32) for p in (x, y))
    depth = (_dot(pose[2] * 4000, xyz) + 4096).astype(np.int32)
    white = np.full((1, 4), 255, np.uint8)
    shaded = np.vstack([white, _shade(normal, colour, gloss, pose, rng)]).view(np.uint32)[:, 0]
    pixels = shaded[_raster(row * _RASTER + column, depth)].tobytes()
    image = Image.frombuffer("RGBX", (_RASTER, _RASTER), pixels, "raw", "RGBX", 0, 1)
    if size == _RASTER // 2:
        return image.reduce(2).convert("RGB")
    return image.convert("RGB").resize((size, size), Image.Resampling.BOX)


def plan(classes: int, images: int) -> list[Photo]:
    """Spread photos evenly over labels and turntable positions, three to one over the splits.

    The labels are the first 1 to 131 of `LABELS`. ``images`` is for all, at least one per label;
    from two per label, each has one in each split. Raises RequestError if a number is out of range.
    """
    if not 1 <= classes <= len(LABELS):
        raise RequestError(f"classes must be 1 to {len(LABELS)}, not {classes}")
    if images < classes:
        raise RequestError(f"images must be at least one per class: {classes}, not {images}")
    photos = []
    for rank, label in enumerate(LABELS[:classes]):
        count = images // classes + (rank < images % classes)
        axes = max(min(3, math.ceil(count / 32)), math.ceil(count / 360))
        for k in range(count):
            turn = k * axes // count
            first, last = (math.ceil(count * t / axes) for t in (turn, turn + 1))
            axis = ("", "r", f"r{turn}")[min(turn, 2)]
            split = "Test" if k % 4 == 1 else "Training"
            photos.append(Photo(split, label, (k - first) * 360 // (last - first), axis))
    return photos


def _write(dest: Path, photos: list[Photo], seed: int) -> int:
    for photo in photos:
        image = render(photo.label, photo.frame, photo.axis, seed=seed)
        image.save(dest / photo.path, "JPEG", quality=90)
    return len(photos)


def _written(dest: Path, photos: list[Photo], seed: int, workers: int) -> Iterator[int]:
    """Render chunks of one label each, and yield the size of each that is done."""
    groups = [list(group) for _, group in groupby(photos, lambda photo: photo.label)]
    chunks = [group[k : k + _CHUNK] for group in groups for k in range(0, len(group), _CHUNK)]
    if min(workers, len(chunks)) == 1:
        yield from (_write(dest, chunk, seed) for chunk in chunks)
        return
    # Spawn, because the caller may have threads. Ctrl-C is for the parent, which cancels the rest.
    spawn, ignore = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(min(workers, len(chunks)), spawn, signal.signal, ignore)
    try:
        tasks = [pool.submit(_write, dest, chunk, seed) for chunk in chunks]
        yield from (task.result() for task in as_completed(tasks))
    finally:
        pool.shutdown(cancel_futures=True)


def synthesize(
    dest: str | Path,
    *,
    classes: int = 131,
    images: int = 90_483,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the photos of `plan` as JPEG files, 100 x 100, and return their number.

    The same arguments give the same bytes, whatever the number of workers. Workers are spawned:
    a script that calls this keeps its own work under ``if __name__ == "__main__":``.

    Parameters
    ----------
    dest
        The folder that takes ``Training`` and ``Test``. Files of the same name are overwritten.
    classes, images
        As for `plan`.
    seed
        As for `render`.
    workers
        Processes; None means one per core.
    progress
        Called with the photos done and the photos in all.

    Raises
    ------
    RequestError
        If a number is out of range, or ``dest`` is not a folder.
    """
    dest = Path(dest)
    photos, done = plan(classes, images), 0
    if dest.exists() and not dest.is_dir():
        raise RequestError(f"{dest} is not a folder: choose another place for the photos")
    for folder in {(dest / photo.path).parent for photo in photos}:
        folder.mkdir(parents=True, exist_ok=True)
    for count in _written(dest, photos, seed, max(1, workers or available_cpus())):
        done += count
        if progress:
            progress(done, len(photos))
    return done


def breakage(dest: Path) -> dict[str, str]:
    """Add one unusable photo of each kind to a synthesized folder.

    Returns
    -------
    dict
        The expected error code of each, by its path below ``dest``.

    Raises
    ------
    RequestError
        If there is no label's folder in ``dest/Training``.
    """
    folders = sorted(path for path in (dest / "Training").glob("*") if path.is_dir())
    if not folders:
        raise RequestError(f"{dest}/Training has no folders: call synthesize first")
    jpeg = io.BytesIO()
    render(LABELS[0], 0).save(jpeg, "JPEG", quality=90)
    contents = {
        "empty": b"",
        "not_an_image": b"This is a text, not a photo.\n",
        "truncated": jpeg.getvalue()[: len(jpeg.getvalue()) // 2],
        "too_large": _large_png(60_000),
    }
    paths = {code: folders[0] / f"{code}_100.jpg" for code in contents}
    for code, content in contents.items():
        paths[code].write_bytes(content)
    return {path.relative_to(dest).as_posix(): code for code, path in paths.items()}


def _large_png(side: int) -> bytes:
    """Return a PNG of about a hundred bytes whose header claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side + 1))
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")
    return b"".join((b"\x89PNG\r\n\x1a\n", *chunks))
