"""Look for what is left of photos: every file of OUT is read, and what is packed is unpacked."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import re
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pomona.model import pca_table
from pomona.privacy import names_in_text
from pomona.workspace import layout

MAGENTA = (255, 0, 255)
"""The colour of the photos that are looked for, and of no other."""


def everything(out: Path) -> Iterator[tuple[str, bytes]]:
    """All bytes of all files, and once more what is packed or escaped in them; names too."""
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = path.relative_to(out).as_posix()
        content = path.read_bytes()
        yield f"name of {name}", name.encode()
        yield name, content
        if path.suffix == ".parquet":
            yield from unpacked(name, path)
        elif path.suffix == ".arrow":
            with pa.OSFile(str(path), "rb") as file:
                yield name, str(pa.ipc.open_file(file).read_all().to_pylist()).encode()
        elif path.suffix == ".json":
            yield name, str(json.loads(content)).encode()
        elif path.suffix == ".html":
            for n, uri in enumerate(re.findall(rb"base64,([A-Za-z0-9+/=]+)", content)):
                yield f"{name}, picture {n}", base64.b64decode(uri)
            for script in re.findall(
                rb'<script type="application/json"[^>]*>(.*?)</script>', content
            ):
                yield name, plain(script)
        elif path.suffix == ".db":
            with sqlite3.connect(path) as database:
                yield name, "\n".join(database.iterdump()).encode()
            database.close()
        elif path.suffix == ".csv":
            numbers = re.findall(rb"-?\d+\.\d+(?:e-?\d+)?", content)
            yield name, np.array(numbers, np.float64).astype(np.float32).tobytes()


def plain(script: bytes) -> bytes:
    """JSON's escapes resolved; the page's own template, in a version's code, is not JSON."""
    try:
        return str(json.loads(script)).encode()
    except ValueError:
        return b""


def unpacked(name: str, path: Path) -> Iterator[tuple[str, bytes]]:
    table = pq.ParquetFile(path).read()
    yield name, str(pq.ParquetFile(path).metadata.to_dict()).encode()
    for column in table.itercolumns():
        if pa.types.is_list(column.type):
            yield name, column.combine_chunks().flatten().to_numpy(zero_copy_only=False).tobytes()
        else:
            yield name, str(column.to_pylist()).encode()


def needles(out: Path, photos: Collection[str]) -> dict[str, bytes]:
    """What must not be found of some photos: names, features, pca_features."""
    wanted = {}
    for path in photos:
        for form in names_in_text.forms(path) | names_in_text.forms(path.rpartition("/")[2]):
            wanted[f"name {form}"] = form.encode()
    for row in feature_rows(out):
        if row["path"] in photos and row["features"]:
            values = np.array(row["features"], np.float32)
            for start in range(0, 1280, 64):
                window = values[start : start + 8]
                if window.any():
                    wanted[f"features {row['path']} {start}"] = window.tobytes()
    for name in ("training_pca", "test_pca"):
        rows = pca_table.read_photos(layout.open_out(out), name, 10**6)
        for path, z in zip(rows.paths, rows.z, strict=True):
            if path in photos:
                for start in (0, len(z) - 8):
                    wanted[f"pca {path} {start}"] = z[start : start + 8].tobytes()
                    wanted[f"pca64 {path} {start}"] = z[start : start + 8].astype(float).tobytes()
    assert len([name for name in wanted if name.startswith("features")]) >= 30
    return wanted


def hits(out: Path, wanted: Mapping[str, bytes]) -> dict[str, str]:
    """Where in OUT each needle, or a thumbnail of the photos' colour, is found."""
    found = {}
    for name, content in everything(out):
        for needle in in_content(content, wanted):
            found[needle] = name
        if ", picture" in name and magenta(content):
            found[f"thumbnail in {name.split(',')[0]}"] = name
    return found


def in_content(content: bytes, wanted: Mapping[str, bytes]) -> frozenset[str]:
    """Which needles bytes hold.

    Remembered by digest: networks of 9 MB are the same in all copies of OUT, and searching one for
    some 150 needles takes most of the time.
    """
    digests = hashlib.sha256(content).digest(), hashlib.sha256(repr(wanted).encode()).digest()
    if digests not in _SEARCHED:
        _SEARCHED[digests] = frozenset(name for name in wanted if wanted[name] in content)
    return _SEARCHED[digests]


_SEARCHED: dict[tuple[bytes, bytes], frozenset[str]] = {}


@functools.cache
def magenta(content: bytes) -> bool:
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    distance = np.abs(pixels - np.array(MAGENTA)).sum(axis=2)
    return bool((distance < 150).sum() > 20)


def feature_rows(out: Path) -> list[dict[str, Any]]:
    rows = [
        {**row, "split": file.parent.name.split("=")[1]}
        for file in sorted((out / "features").glob("split=*/*.parquet"))
        for row in pq.ParquetFile(file).read().to_pylist()
    ]
    return sorted(rows, key=lambda row: str(row["path"]))


def tree(out: Path) -> dict[str, str]:
    """The digest of each file."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }
