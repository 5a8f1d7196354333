"""Smaller copies of a source."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections import defaultdict
from pathlib import Path

import pyarrow as pa

from pomona.core.errors import RequestError, SourceError, first_line
from pomona.photos.listing import Listing
from pomona.photos.reading import reader
from pomona.photos.source import Source, arrange

log = logging.getLogger("pomona")


def choose(photos: pa.Table, percentage: float) -> list[str]:
    """Choose photos (`pomona.core.schema.PHOTOS`) by split and label, at least one of each.

    The choice depends on the paths alone; that of a smaller percentage is part of a larger one's.
    """
    if not 0 < percentage <= 100:
        raise RequestError(f"--percentage is above 0 and up to 100, not {percentage:g}")
    strata: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in photos.select(["split", "label", "path"]).to_pylist():
        strata[row["split"], row["label"]].append(row["path"])
    chosen: list[str] = []
    for paths in strata.values():
        count = max(1, round(len(paths) * percentage / 100))
        chosen += sorted(paths, key=lambda p: hashlib.blake2b(p.encode()).digest())[:count]
    return sorted(chosen)


def subset(
    source: Source, listing: Listing, dest: Path, percentage: float, *, copy: bool = False
) -> int:
    """Make a smaller source of links to the photos, or of copies. Returns the number of photos.

    Photos of an object store are always copied. Raises RequestError if ``dest`` lies in the source,
    or holds something already.
    """
    dest = dest.expanduser().resolve()
    if source.kind == "local" and dest.is_relative_to(source.root):
        raise RequestError(f"{dest} lies inside the source: choose a folder outside it")
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise RequestError(f"{dest} is not an empty folder: choose another")
    chosen = choose(arrange(listing.files), percentage)
    if not chosen:
        raise SourceError(f"{source.name} holds no photos")
    return sum(_place(source, path, dest / path, copy=copy) for path in chosen)


def _place(source: Source, path: str, to: Path, *, copy: bool) -> bool:
    """Put one photo into a subset. Returns whether it could be read."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if to.exists():  # the folder was empty, and a path is there once
        raise RequestError(
            f"{path} has the place of another photo already: on this disk, names that differ in "
            "case alone are one; choose a folder on another disk"
        )
    try:
        if source.kind != "local":
            to.write_bytes(reader(source)(path))
        elif copy:
            shutil.copy2(Path(source.root, path), to)
        else:
            _link(Path(source.root, path), to)
    except OSError as error:
        log.warning("not in the subset: %s: %s", path, first_line(error))
        return False
    return True


def _link(photo: Path, to: Path) -> None:
    """Make a hard link if the disk allows it (it outlives the source), else a symbolic link."""
    try:
        os.link(photo, to)
    except OSError:
        to.symlink_to(photo)
