"""Rows of the PCA tables in memory, all or a sample, and their groups."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pomona.backbone.weights import mark
from pomona.core.errors import RequestError
from pomona.model.sampling import SEED, Codes, Flags
from pomona.photos.source import folder_of
from pomona.workspace.layout import Out

FOLDERS = {"Training": "training_pca", "Test": "test_pca"}
"""The PCA table of each split, in OUT."""
MAX_ROWS = 1_000_000
"""Of a PCA table in memory: 200 MB with 50 components."""


@dataclass(frozen=True)
class Photos:
    """Rows of a PCA table."""

    paths: npt.NDArray[np.object_]  # [n]
    labels: npt.NDArray[np.object_]  # [n]
    z: npt.NDArray[np.float32]  # pca_features [n, k]
    of: int  # how many rows the table has

    def take(self, chosen: Any) -> Photos:
        """Return some of the rows."""
        return replace(self, paths=self.paths[chosen], labels=self.labels[chosen], z=self.z[chosen])


_LABELS = ds.partitioning(pa.schema([("label", pa.string())]), flavor="hive")


def read_photos(out: Out, table: str, max_rows: int) -> Photos:
    """Read a PCA table, or, above ``max_rows``, a sample of it that is stratified by label.

    RequestError if numbers in it aren't finite.
    """
    folder = out.root / table
    files = sorted(folder.rglob("*.parquet")) if folder.is_dir() else []
    counts = [pq.ParquetFile(file).metadata.num_rows for file in files]
    share = min(1.0, max_rows / max(1, sum(counts)))
    rng = np.random.default_rng(SEED)
    parts = [_read_some(file, folder, share, rng) for file in files]
    joined = pa.concat_tables(parts) if parts else pa.table({"path": [], "label": []})
    z = _matrix(joined) if parts else np.zeros((0, 0), np.float32)
    paths = joined["path"].to_numpy(zero_copy_only=False)
    bad = ~np.isfinite(z).all(axis=1)
    if bad.any():
        raise RequestError(
            f"{folder} holds numbers that are not finite for {bad.sum()} photos (first: "
            f"{paths[bad][0]}): run pomona reduce again"
        )
    return Photos(paths, joined["label"].to_numpy(zero_copy_only=False), z, sum(counts))


def _read_some(file: Path, folder: Path, share: float, rng: np.random.Generator) -> pa.Table:
    dataset = ds.dataset(str(file), partitioning=_LABELS, partition_base_dir=str(folder))
    rows = dataset.to_table(["path", "label", "pca_features"])
    if share == 1:
        return rows
    most = max(1, round(rows.num_rows * share))
    return rows.take(pa.array(np.sort(rng.permutation(rows.num_rows)[:most])))


def _matrix(rows: pa.Table) -> npt.NDArray[np.float32]:
    column = rows["pca_features"].combine_chunks()
    values: npt.NDArray[np.float32] = column.flatten().to_numpy()
    return values.reshape(rows.num_rows, -1)


def groups_of(photos: Photos) -> Codes:
    """Return the code of each photo's group: the folder that holds it."""
    folders = [folder_of(path) for path in photos.paths]
    return np.unique(folders, return_inverse=True)[1].astype(np.int64)


def unseen_by(photos: Photos, tuned_on: Collection[str]) -> Flags:
    """Return which photos lie in no folder that the weights were tuned on, bool [n].

    ``tuned_on`` are those folders, as `pomona.backbone.weights.mark` gives them.
    """
    if not tuned_on:
        return np.ones(len(photos.paths), bool)
    tuned = set(tuned_on)
    folders = [folder_of(path) for path in photos.paths]
    unseen = {folder: mark(folder) not in tuned for folder in set(folders)}
    return np.array([unseen[folder] for folder in folders], bool)
