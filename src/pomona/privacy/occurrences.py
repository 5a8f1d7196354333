"""Where photos occur in OUT: rows of its tables, names in its files, models trained with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pomona.backbone.extract import features_of
from pomona.core.files import read_json
from pomona.core.parquet import gather
from pomona.model.pca_table import FOLDERS
from pomona.pipeline.reduce_tasks import partition
from pomona.privacy.names_in_text import Names
from pomona.registry import lineage
from pomona.registry.lineage import Lineage
from pomona.workspace import feature_table
from pomona.workspace.feature_table import Index
from pomona.workspace.layout import Out

PCA_TABLES = tuple(FOLDERS.values())
DERIVED = (
    "projection",
    "model",
    *(f"{name}{kind}" for name in PCA_TABLES for kind in ("", "_csv")),
)
"""What is made from the features, and can hold a photo's numbers."""
REPORT_FILES = ("report.html", "metrics.json", "pca_variance.png")
REMOVED = (*DERIVED, "export", *(f"report/{name}" for name in REPORT_FILES))
"""What is removed, as it may have been made with a photo."""


@dataclass(frozen=True)
class Tables:
    """The rows that OUT holds: ``index`` has those of features and of an unfinished extract."""

    index: Index
    pca_paths: dict[str, pa.ChunkedArray]  # the column ``path`` of each PCA table

    @cached_property
    def paths(self) -> pa.Array:
        """Each path in any of the tables once."""
        return pc.unique(_joined([self.index.rows["path"], *self.pca_paths.values()]))


def read_tables(out: Out) -> Tables:
    """Read which rows OUT holds."""
    spec = read_json(out.table_file).get("spec", {})
    # A file that can't be read goes as a whole: it may hold the photo.
    index = feature_table.index(out, feature_table.parts_folder(out, spec), damaged="drop")
    pca_paths = {}
    for name in PCA_TABLES:
        files = sorted((out.root / name).rglob("*.parquet"))
        pca_paths[name] = _joined(pq.ParquetFile(file).read(["path"])["path"] for file in files)
    return Tables(index, pca_paths)


def _joined(columns: Iterable[pa.ChunkedArray]) -> pa.ChunkedArray:
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())


@dataclass(frozen=True)
class Occurrences:
    """Where photos that are to be erased occur in OUT."""

    paths: frozenset[str]  # of the photos
    index: Index  # as in `Tables`
    erased: npt.NDArray[np.bool_]  # [rows of the index]: which go
    names: Names
    pca_rows: dict[str, int]  # how many go, by PCA table
    stale: bool
    """Whether report, model or export may hold a photo that the tables don't hold any more."""

    @cached_property
    def in_table(self) -> npt.NDArray[np.bool_]:
        """Which rows are the table's, and not those of parts, bool [rows]."""
        return np.asarray(self.index.rows["file"].to_numpy() < self.index.table_files)

    @property
    def counts(self) -> dict[str, int]:
        """How many rows go, by table."""
        is_rejected = self.index.rows["error"].is_valid().to_numpy()
        return {
            "features": int((self.erased & self.in_table).sum()),
            "parts": int((self.erased & ~self.in_table).sum()),
            "rejected.csv": int((self.erased & self.in_table & is_rejected).sum()),
            **self.pca_rows,
            **{f"{name}_csv": count for name, count in self.pca_rows.items()},
        }

    @property
    def in_derived(self) -> bool:
        """Whether what was made from the tables was, or may have been, made with a photo."""
        return self.stale or bool(self.erased.any()) or any(self.pca_rows.values())

    @cached_property
    def rows_by_file(self) -> dict[int, npt.NDArray[np.int64]]:
        """The rows that go, by the file (index into ``index.files``) that holds them."""
        files = self.index.rows["file"].to_numpy()[self.erased]
        rows = self.index.rows["row"].to_numpy()[self.erased]
        return {int(file): rows[files == file] for file in np.unique(files)}


def locate(out: Out, tables: Tables, paths: frozenset[str]) -> Occurrences:
    """Find the rows and the names of some photos."""
    rows, wanted = tables.index.rows, pa.array(sorted(paths), pa.string())
    erased = pc.is_in(rows["path"], wanted).to_numpy()
    kept = rows.filter(pa.array(~erased))
    filenames = pa.array(sorted({path.rpartition("/")[2] for path in paths}), pa.string())
    unshared = filenames.filter(pc.invert(pc.is_in(filenames, pc.unique(kept["filename"]))))
    lost = _lost_labels(rows.filter(pa.array(erased))["label"], kept["label"])
    names = Names(paths, [*unshared.to_pylist(), *lost])
    pca_rows = {
        name: pc.sum(pc.is_in(column, wanted)).as_py() or 0
        for name, column in tables.pca_paths.items()
    }
    return Occurrences(paths, tables.index, erased, names, pca_rows, _is_stale(out, names))


def _lost_labels(erased: pa.ChunkedArray, kept: pa.ChunkedArray) -> list[str]:
    """Return the folders of labels that lose their last photo, as logs may name them."""
    labels = pc.unique(erased)
    lost = labels.filter(pc.invert(pc.is_in(labels, pc.unique(kept)))).to_pylist()
    return [
        name
        for label in lost
        for name in (f"label={label}", partition(label), partition(label, escape_all=True))
    ]


def _is_stale(out: Out, names: Names) -> bool:
    """Tell whether the report names a photo, or model or export were made from older tables."""
    files = [out.report / name for name in REPORT_FILES]
    if any(names.are_in_file(file) for file in files if file.exists()):
        return True
    reduced = read_json(out.manifest).get("stages", {}).get("reduce", {}).get("digests", {})
    model = read_json(out.model / "model.json")
    made_from = model.get("made_from", {}).get("digests", {})
    if any(reduced.get(name) != digest for name, digest in made_from.items()):
        return True
    exported = read_json(out.root / "export" / "export.json").get("model", {})
    newest = model.get("digests", {}).get("model.onnx")
    return bool(exported) and exported.get("digest") != newest


def lineage_of(out: Out, occurrences: Occurrences) -> Lineage:
    """Return what tells the models that were trained with the photos."""
    in_pca = bool(occurrences.pca_rows["training_pca"])
    rows = occurrences.index.rows.filter(pa.array(occurrences.erased))
    # What is in no table now may have been a Training photo, unless its path says Test.
    absent = occurrences.paths.difference(rows["path"].to_pylist())
    unseen = not in_pca and any(not path.startswith("Test/") for path in absent)
    vectors = _training_features(out, occurrences.index, rows)
    return lineage.of(out, in_pca=in_pca, unseen=unseen, vectors=vectors)


def _training_features(out: Out, index: Index, rows: pa.Table) -> npt.NDArray[np.float32]:
    """Return the features [n, 1280] of those of the rows that are Training photos."""
    rows = rows.filter(pc.and_(pc.equal(rows["split"], "Training"), pc.is_null(rows["error"])))
    plan = rows.select(["file", "row"]).combine_chunks().to_batches()
    parts = [
        features_of(table["features"])
        for batch in plan
        for _, table in gather(batch, str(out.root), index.files, ["features"])
    ]
    return np.concatenate(parts) if parts else np.zeros((0, 1280), np.float32)
