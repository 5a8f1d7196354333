"""Statistics of a source: counts, pixel sizes, duplicates."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pomona.core.object_store import READ_AHEAD
from pomona.core.schema import SPLITS
from pomona.photos import decoding
from pomona.photos.listing import Listing
from pomona.photos.reading import reader
from pomona.photos.source import Source, arrange, layout_hint

OnDone = Callable[[int, int], None]


def inspect(
    source: Source, listing: Listing, label: str = "parent", on_done: OnDone | None = None
) -> dict[str, Any]:
    """Describe a source. Reads each photo once."""
    photos = arrange(listing.files, label, root=source.folder)
    splits = {s: photos.filter(pc.equal(photos["split"], s)) for s in SPLITS}
    counts = Counter(photos["label"].to_pylist())
    ranked = sorted(counts.items(), key=lambda row: (-row[1], row[0]))
    sizes, duplicates = _look(source, photos, on_done or (lambda done, total: None))
    unrecognised = sizes.pop(None, 0)
    most_frequent = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:10]
    labels = {name: set(table["label"].to_pylist()) for name, table in splits.items()}
    return {
        "source": source.name,
        "photos": photos.num_rows,
        "bytes": pc.sum(photos["size"]).as_py() or 0,
        "splits": {name: table.num_rows for name, table in splits.items()},
        "labels": len(counts),
        "largest": ranked[:20],  # (label, photos)
        "smallest": ranked[::-1][:20],
        "only_in": {  # labels of one split alone
            name: sorted(labels[name] - labels[other])
            for name, other in (SPLITS, SPLITS[::-1])
            if splits["Test"].num_rows and splits["Training"].num_rows
        },
        "pixel_sizes": [[f"{w}×{h}", n] for (w, h), n in most_frequent],
        "unrecognised": unrecognised,  # photos whose header can't be read
        "duplicates": duplicates,
        "not_photos": dict(listing.others.most_common()),  # files by suffix
        "outside_splits": listing.files.num_rows - photos.num_rows,
        "hint": layout_hint(listing.files),
    }


def _look(source: Source, photos: pa.Table, on_done: OnDone) -> tuple[Counter[Any], dict[str, Any]]:
    """Read photos with a few threads: count pixel sizes, and find copies.

    Only photos that share their number of bytes with another are hashed.
    """
    read = reader(source)
    paths, splits = photos["path"].to_pylist(), photos["split"].to_pylist()
    bytes_ = photos["size"].to_pylist()
    shared = {size for size, n in Counter(bytes_).items() if n > 1 and size}

    def size_and_digest(number: int) -> tuple[tuple[int, int] | None, str | None]:
        try:
            content = read(paths[number])
        except OSError:
            return None, None
        digest = hashlib.sha256(content).hexdigest() if bytes_[number] in shared else None
        return decoding.pixel_size(content), digest

    sizes: Counter[Any] = Counter()
    copies: dict[str, list[int]] = defaultdict(list)
    with ThreadPoolExecutor(2 if source.kind == "local" else READ_AHEAD) as pool:
        for number, (size, digest) in enumerate(pool.map(size_and_digest, range(len(paths)))):
            sizes[size] += 1
            if digest:
                copies[digest].append(number)
            if number % 1000 == 999 or number + 1 == len(paths):
                on_done(number + 1, len(paths))
    return sizes, _duplicates([[(splits[n], paths[n]) for n in c] for c in copies.values()])


def _duplicates(groups: list[list[tuple[str, str]]]) -> dict[str, Any]:
    """Count the copies of another photo in a split, and the Test photos with a copy in Training.

    A group holds (split, path) of the photos that share their bytes.
    """
    groups = [group for group in groups if len(group) > 1]
    within = sum(n - 1 for group in groups for n in Counter(split for split, _ in group).values())
    across = [group for group in groups if len({split for split, _ in group}) > 1]
    between = sum(sum(split == "Test" for split, _ in group) for group in across)
    examples = [sorted(path for _, path in group) for group in (across or groups)[:5]]
    return {"within": within, "between": between, "examples": examples}
