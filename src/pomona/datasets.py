"""What is in a source, and smaller copies of it."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pomona import images, sources
from pomona.errors import RequestError, SourceError
from pomona.schema import SPLITS
from pomona.sources import Listing, Source

log = logging.getLogger("pomona")

OnDone = Callable[[int, int], None]


def inspect(
    source: Source, listing: Listing, label: str = "parent", on_done: OnDone | None = None
) -> dict[str, Any]:
    """Describe a source. Reads every photo once.

    Returns
    -------
    dict
        ``photos``, ``bytes``, ``splits``, ``labels`` (count), ``largest`` and ``smallest`` (up to
        twenty [label, photos]), ``only_in`` (labels of one split), ``pixel_sizes`` (the ten most
        frequent), ``unrecognised`` (photos whose header can't be read), ``duplicates`` (``within``
        and ``between`` splits: photos that are a copy of another), ``not_photos`` (by suffix),
        ``outside_splits``.
    """
    photos = sources.arrange(listing.files, label, root=source.folder)
    splits = {s: photos.filter(pc.equal(photos["split"], s)) for s in SPLITS}
    counts = Counter(photos["label"].to_pylist())
    ranked = sorted(counts.items(), key=lambda row: (-row[1], row[0]))
    sizes, duplicates = _look(source, photos, on_done or (lambda done, total: None))
    unknown = sizes.pop(None, 0)
    labels = {name: set(table["label"].to_pylist()) for name, table in splits.items()}
    return {
        "source": source.name,
        "photos": photos.num_rows,
        "bytes": pc.sum(photos["size"]).as_py() or 0,
        "splits": {name: table.num_rows for name, table in splits.items()},
        "labels": len(counts),
        "largest": ranked[:20],
        "smallest": ranked[::-1][:20],
        "only_in": {
            name: sorted(labels[name] - labels[other])
            for name, other in (SPLITS, SPLITS[::-1])
            if splits["Test"].num_rows and splits["Training"].num_rows
        },
        "pixel_sizes": [[f"{w}×{h}", n] for (w, h), n in _most(sizes)],
        "unrecognised": unknown,
        "duplicates": duplicates,
        "not_photos": dict(listing.others.most_common()),
        "outside_splits": listing.files.num_rows - photos.num_rows,
        "hint": sources.layout_hint(listing.files),
    }


def _most(sizes: Counter[Any]) -> list[tuple[tuple[int, int], int]]:
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:10]


def _look(source: Source, photos: pa.Table, on_done: OnDone) -> tuple[Counter[Any], dict[str, Any]]:
    """Read photos with a few threads: pixel sizes, and digests of those that share their size."""
    read = sources.reader(source)
    paths, splits = photos["path"].to_pylist(), photos["split"].to_pylist()
    bytes_ = photos["size"].to_pylist()
    shared = {size for size, n in Counter(bytes_).items() if n > 1 and size}

    def one(number: int) -> tuple[tuple[int, int] | None, str | None]:
        try:
            content = read(paths[number])
        except OSError:
            return None, None
        digest = hashlib.sha256(content).hexdigest() if bytes_[number] in shared else None
        return _pixels(content), digest

    sizes: Counter[Any] = Counter()
    copies: dict[str, list[int]] = defaultdict(list)
    with ThreadPoolExecutor(2 if source.kind == "local" else sources.READ_AHEAD) as pool:
        for number, (size, digest) in enumerate(pool.map(one, range(len(paths)))):
            sizes[size] += 1
            if digest:
                copies[digest].append(number)
            if number % 1000 == 999 or number + 1 == len(paths):
                on_done(number + 1, len(paths))
    return sizes, _duplicates([[(splits[n], paths[n]) for n in c] for c in copies.values()])


def _pixels(content: bytes) -> tuple[int, int] | None:
    try:
        with Image.open(io.BytesIO(content), formats=images.FORMATS) as image:
            return image.size
    except Exception:  # noqa: BLE001 - Pillow's readers raise nearly any type on damaged headers
        return None


def _duplicates(groups: list[list[tuple[str, str]]]) -> dict[str, Any]:
    """Count copies: a photo beside its first of the same bytes in a split, or across splits."""
    groups = [group for group in groups if len(group) > 1]
    within = sum(n - 1 for group in groups for n in Counter(split for split, _ in group).values())
    across = [group for group in groups if len({split for split, _ in group}) > 1]
    between = sum(sum(split == "Test" for split, _ in group) for group in across)
    examples = [sorted(path for _, path in group) for group in (across or groups)[:5]]
    return {"within": within, "between": between, "examples": examples}


# --- subset ------------------------------------------------------------------------------------


def choose(photos: pa.Table, percentage: float) -> list[str]:
    """Choose photos, stratified by split and label: of each at least one.

    The choice depends on the paths alone, and a smaller percentage's is part of a larger one's.

    Parameters
    ----------
    photos
        As `pomona.schema.PHOTOS`.
    percentage
        Above 0, up to 100.
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
    """Make a smaller source: links to the photos (copies from an object store). Returns the count.

    Raises
    ------
    RequestError
        If ``dest`` lies in the source, or holds something already.
    """
    dest = dest.expanduser().resolve()
    if source.kind == "local" and dest.is_relative_to(source.root):
        raise RequestError(f"{dest} lies inside the source: choose a folder outside it")
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise RequestError(f"{dest} is not an empty folder: choose another")
    chosen = choose(sources.arrange(listing.files), percentage)
    if not chosen:
        raise SourceError(f"{source.name} holds no photos")
    return sum(_place(source, path, dest / path, copy=copy) for path in chosen)


def _place(source: Source, path: str, to: Path, *, copy: bool) -> bool:
    """Put one photo into a subset; False if it can't be read."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        if source.kind != "local":
            to.write_bytes(sources.reader(source)(path))
        elif copy:
            shutil.copy2(Path(source.root, path), to)
        else:
            _link(Path(source.root, path), to)
    except OSError as error:
        log.warning("not in the subset: %s: %s", path, sources.first_line(error))
        return False
    return True


def _link(photo: Path, to: Path) -> None:
    """Make a hard link where the disk allows it (it outlives the source), else a symbolic one."""
    try:
        os.link(photo, to)
    except OSError:
        to.symlink_to(photo)
