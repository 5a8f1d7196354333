"""Leakage: Test photos that are near-copies of Training photos. Reads ``OUT/features``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
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


def near_copies(out: Out, on_done: Callable[[], None]) -> dict[str, Any]:
    """Find for each Test photo the Training photo with the highest cosine of features.

    Returns
    -------
    dict
        ``cosine`` (the limit, `ALIKE`), ``looked_at`` (Test photos), ``of``, and ``pairs``: for
        each near-copy its ``path``, the Training photo ``like``, and their ``cosine``.
    """
    groups = {split: list(_row_groups(out, split)) for split in ("Training", "Test")}
    counts = {split: sum(n for _, _, n in found) for split, found in groups.items()}
    most = min(MOST_TEST, MOST_PAIRS // max(1, counts["Training"]))
    share = min(1.0, most / max(1, counts["Test"]))
    rng = np.random.default_rng(0)
    paths, test = _sample(out, groups["Test"], share, rng)
    best = np.full(len(test), -1.0, np.float32)
    like = np.empty(len(test), object)
    if len(test):
        for group in groups["Training"]:
            names, rows = _read(out, group)
            if len(rows):
                _keep_best(test, rows, names, best, like)
            on_done()
    close = np.flatnonzero(best >= ALIKE)
    pairs = [
        {"path": paths[n], "like": like[n], "cosine": round(float(min(best[n], 1)), 4)}
        for n in close[np.argsort(-best[close], kind="stable")]
    ]
    return {"cosine": ALIKE, "looked_at": paths, "of": counts["Test"], "pairs": pairs}


def _keep_best(test: Rows, rows: Rows, names: list[str], best: Rows, like: Any) -> None:
    for start in range(0, len(test), 4096):
        here = slice(start, start + 4096)
        cosines = test[here] @ rows.T
        found = cosines.argmax(axis=1)
        value = cosines[np.arange(len(found)), found]
        better = value > best[here]
        best[here][better] = value[better]
        like[here][better] = np.array(names, object)[found[better]]


Group = tuple[str, int, int]
"""(file, row group, rows)."""


def _row_groups(out: Out, split: str) -> Iterator[Group]:
    for name in sorted(read_json(out.table_file)["files"]):
        if name.startswith(f"split={split}/"):
            about = pq.ParquetFile(out.features / name).metadata
            for number in range(about.num_row_groups):
                yield name, number, about.row_group(number).num_rows


def _read(out: Out, group: Group) -> tuple[list[str], Rows]:
    """Return the paths and the features, of length 1, of the photos that have some."""
    file = pq.ParquetFile(out.features / group[0])
    table: pa.Table = file.read_row_group(group[1], columns=["path", "features"])
    table = table.filter(table["features"].is_valid())
    rows = features_of(table["features"])
    length = np.sqrt((rows**2).sum(axis=1, keepdims=True))
    return table["path"].to_pylist(), rows / np.maximum(length, 1e-12)


def _sample(
    out: Out, groups: list[Group], share: float, rng: np.random.Generator
) -> tuple[list[str], Rows]:
    paths: list[str] = []
    parts: list[Rows] = []
    for group in groups:
        names, rows = _read(out, group)
        chosen = np.flatnonzero(rng.random(len(names)) < share) if share < 1 else slice(None)
        paths += np.array(names, object)[chosen].tolist()
        parts.append(rows[chosen])
    return paths, np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
