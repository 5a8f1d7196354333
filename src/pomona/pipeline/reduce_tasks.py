"""The tasks of reduce: moments of row groups, and PCA rows as Parquet by label and as CSV."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from pomona.backbone.extract import features_of
from pomona.core.errors import DamagedError
from pomona.core.files import atomic_file, sha256
from pomona.core.parquet import gather, read_chunk, read_group
from pomona.core.printable import cells
from pomona.core.schema import PCA_TABLE, without
from pomona.model.pca_table import FOLDERS
from pomona.model.projection import Moments, Projection, merge, raised

Group = tuple[str, int]
"""(file relative to OUT, row group)."""


@dataclass(frozen=True)
class MomentsTask:
    """Write the moments of some row groups. Picklable. Runs on workers, too."""

    root: str
    groups: tuple[tuple[Group, ...], ...]
    to: str
    power: float

    def __call__(self, number: int) -> dict[str, Any]:
        """Write ``to/NUMBER.npz``, or return what is ``damaged``."""
        try:
            total = merge(self._group(*group) for group in self.groups[number])
        except DamagedError as error:
            return {"damaged": str(error)}
        with atomic_file(Path(self.to, f"{number}.npz")) as part, part.open("wb") as file:
            np.savez(file, count=total.count, mean=total.mean, scatter=total.scatter)
        return {}

    def _group(self, name: str, group: int) -> Moments:
        column = read_group(self.root, name, group, ["features"])["features"]
        return Moments.of(raised(features_of(column.drop_null()), self.power))


def partition(label: str, *, escape_all: bool = False) -> str:
    """Name a label's folder as Spark and Hive do, so that pandas, pyarrow and DuckDB read it back.

    >>> partition("Apple 10"), partition("50% = half"), partition("Pêche")
    ('label=Apple 10', 'label=50%25 %3D half', 'label=Pêche')
    >>> partition("ap", escape_all=True)
    'label=%61%70'
    """
    if escape_all:
        return "label=" + "".join(f"%{byte:02X}" for byte in label.encode())
    return "label=" + "".join(
        f"%{ord(c):02X}" if c in "\"#%'*/:=?\\{[]^\x7f" or ord(c) < 0x20 else c for c in label
    )


def partitions(labels: Iterable[str]) -> dict[str, str]:
    """Return each label's folder, such that no two are one where a disk ignores case.

    Of labels that differ in case or in Unicode's composition alone, all but the first are escaped
    byte by byte, which readers undo.

    >>> partitions(["Apple", "apple"])
    {'Apple': 'label=Apple', 'apple': 'label=%61%70%70%6C%65'}
    """
    folders: dict[str, str] = {}
    taken = set()
    for label in sorted(labels):
        folded = unicodedata.normalize("NFC", label).casefold()
        folders[label] = partition(label, escape_all=folded in taken)
        taken.add(folded)
    return folders


@dataclass(frozen=True)
class ProjectTask:
    """Write the PCA rows of one chunk: Parquet by label, CSV. Picklable. Runs on workers, too."""

    chunks: str
    root: str
    files: tuple[str, ...]
    projection: Projection
    staged: str
    folders: dict[str, str]  # of labels
    csv_safe: bool = False

    def __call__(self, number: int) -> dict[str, Any]:
        """Return ``files``: the sha256 of each file written, by name; or what is ``damaged``."""
        plan = read_chunk(self.chunks, number)
        try:
            parts = [
                self.projection.transform(features_of(rows["features"]))
                for _, rows in gather(plan, self.root, self.files, ["features"])
            ]
        except DamagedError as error:
            return {"damaged": str(error)}
        values = np.concatenate(parts)
        name = FOLDERS[plan["split"][0].as_py()]
        written = [
            *self._write_labels(plan, values, Path(self.staged, name), number),
            _write_csv(plan, values, Path(self.staged, f"{name}_csv"), number, self.csv_safe),
        ]
        staged = Path(self.staged)
        return {
            "files": {p.relative_to(staged).as_posix(): sha256(p) for p in written},
            "rows": {name: plan.num_rows},
        }

    def _write_labels(
        self, plan: pa.RecordBatch, values: npt.NDArray[np.float32], folder: Path, number: int
    ) -> Iterator[Path]:
        count, k = values.shape
        offsets = pa.array(np.arange(0, count * k + 1, k, dtype=np.int32))
        lists = pa.ListArray.from_arrays(offsets, pa.array(values.ravel()))
        table = pa.table([plan["path"], plan["label"], plan["filename"], lists], schema=PCA_TABLE)
        labels = plan["label"].to_pylist()
        cuts = [0, *(n for n in range(1, count) if labels[n] != labels[n - 1]), count]
        for start, stop in itertools.pairwise(cuts):
            path = folder / self.folders[labels[start]] / f"part-{number:05d}.parquet"
            rows = table.slice(start, stop - start).select(without(PCA_TABLE, "label").names)
            with atomic_file(path) as part:
                pq.write_table(rows, part, compression="zstd", use_dictionary=False)
            yield path


def _write_csv(
    plan: pa.RecordBatch,
    values: npt.NDArray[np.float32],
    folder: Path,
    number: int,
    csv_safe: bool,
) -> Path:
    path = folder / f"part-{number:05d}.csv"
    columns = {name: cells(plan[name], csv_safe=csv_safe) for name in ("label", "filename")}
    columns |= {f"f_{n}": pa.array(np.ascontiguousarray(v)) for n, v in enumerate(values.T)}
    with atomic_file(path) as part:
        pcsv.write_csv(pa.table(columns), part)
    return path
