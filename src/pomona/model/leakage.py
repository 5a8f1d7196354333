"""Leakage: Test photos that are near-copies of Training photos. Reads ``OUT/features``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from pomona.backbone.extract import features_of
from pomona.core.files import read_json
from pomona.workspace.layout import Out

Rows = npt.NDArray[np.float32]

ALIKE = 0.98
"""Cosine of raw features. Neighbours on Fruits-360's turntable have 0.99 (median), photos of
different varieties at most 0.96."""
MOST_TEST = 20_000
"""Test photos that are looked at: 100 MB of features."""
MOST_PAIRS = 2_000_000_000
"""About two minutes on two cores."""


def near_copies(out: Out) -> dict[str, Any]:
    """Find for each Test photo the Training photo with the highest cosine of features.

    Returns ``cosine`` (the limit, `ALIKE`), ``looked_at`` (Test photos), ``of``, and ``pairs``: for
    each near-copy its ``path``, the Training photo ``like``, and their ``cosine``.
    """
    training, test_groups = (list(_row_groups(out, split)) for split in ("Training", "Test"))
    count = sum(rows for _, _, rows in test_groups)
    most = min(MOST_TEST, MOST_PAIRS // max(1, sum(rows for _, _, rows in training)))
    paths, test = _sample(out, test_groups, min(1.0, most / max(1, count)))
    best = np.full(len(test), -1.0, np.float32)
    like = np.empty(len(test), object)
    if len(test):
        for group in training:
            names, rows = _read(out, group)
            if len(rows):
                _keep_best(test, rows, names, best, like)
    close = np.flatnonzero(best >= ALIKE)
    pairs = [
        {"path": paths[n], "like": like[n], "cosine": round(float(min(best[n], 1)), 4)}
        for n in close[np.argsort(-best[close], kind="stable")]
    ]
    return {"cosine": ALIKE, "looked_at": paths, "of": count, "pairs": pairs}


def _keep_best(test: Rows, rows: Rows, names: list[str], best: Rows, like: Any) -> None:
    """Put rows that are nearer than the best so far into ``best`` and ``like``."""
    for start in range(0, len(test), 4096):
        block = slice(start, start + 4096)
        cosines = test[block] @ rows.T
        nearest = cosines.argmax(axis=1)
        cosine = cosines[np.arange(len(nearest)), nearest]
        better = cosine > best[block]
        best[block][better] = cosine[better]
        like[block][better] = np.array(names, object)[nearest[better]]


Group = tuple[str, int, int]
"""(file, row group, rows)."""


def _row_groups(out: Out, split: str) -> Iterator[Group]:
    for name in sorted(read_json(out.table_file)["files"]):
        if name.startswith(f"split={split}/"):
            metadata = pq.ParquetFile(out.features / name).metadata
            for number in range(metadata.num_row_groups):
                yield name, number, metadata.row_group(number).num_rows


def _read(out: Out, group: Group) -> tuple[list[str], Rows]:
    """Return the paths and the features, scaled to length 1, of the photos that have features."""
    file = pq.ParquetFile(out.features / group[0])
    table = file.read_row_group(group[1], columns=["path", "features"])
    table = table.filter(table["features"].is_valid())
    rows = features_of(table["features"])
    length = np.sqrt((rows**2).sum(axis=1, keepdims=True))
    return table["path"].to_pylist(), rows / np.maximum(length, 1e-12)


def _sample(out: Out, groups: list[Group], share: float) -> tuple[list[str], Rows]:
    rng = np.random.default_rng(0)
    paths: list[str] = []
    parts: list[Rows] = []
    for group in groups:
        names, rows = _read(out, group)
        chosen = np.flatnonzero(rng.random(len(names)) < share) if share < 1 else slice(None)
        paths += np.array(names, object)[chosen].tolist()
        parts.append(rows[chosen])
    return paths, np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
