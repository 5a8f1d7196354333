"""The table of features on disk: what is done, what is to do, and how parts become the table.

While ``extract`` runs, each task leaves one *part* in ``OUT/_work/parts-…``, written aside and
renamed when it is whole, so that a part that is there is complete. At the end parts and table
become the new table: files of about 128 MB, rows by path, one folder for each split. A full file
whose rows all stay is left alone. `manifest.commit` makes the change whole.

Functions marked so run on workers, if those see the driver's OUT. Where they don't, a part is
written to a folder of the worker's own and comes back through Spark, and the table is written on
the driver (`engine.run_chunks`, `pomona.spark.executors`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from pomona.core.errors import MismatchError
from pomona.core.files import atomic_file, read_json, tree_digest
from pomona.core.parquet import open_parquet
from pomona.core.schema import FEATURES_TABLE, PHOTOS, REJECTED, UNREADABLE
from pomona.workspace.layout import Out

log = logging.getLogger("pomona")


PART_FORMAT = "{run}-{task:06d}-{rows}-{rejected}.parquet"
"""A part's name tells its counts, so that progress is one look at a folder."""


def task_of(name: str) -> int:
    """Return the number of the task that a part's name tells."""
    return int(name.split("-")[1])


# --- what there is -----------------------------------------------------------------------------


def parts_folder(out: Out, fingerprint: dict[str, object]) -> Path:
    """Return the folder of parts of one spec: an orphan of a killed run can't reach another's."""
    name = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
    return out.work / f"parts-{name}"


class Counts(NamedTuple):
    """Rows in parts."""

    done: int = 0
    rejected: int = 0


def count_parts(folder: Path, run: str = "") -> Counts:
    """Count the rows in parts (of one run) by their names."""
    done = rejected = 0
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except FileNotFoundError:
        return Counts()
    for name in names:
        if name.endswith(".parquet") and name.startswith(run):
            rows, bad = name.removesuffix(".parquet").split("-")[-2:]
            done, rejected = done + int(rows), rejected + int(bad)
    return Counts(done, rejected)


@dataclass(frozen=True)
class Index:
    """Where each row lies.

    Attributes
    ----------
    rows
        ``PHOTOS`` and ``error``, ``file`` (index into ``files``, int32), ``row`` (int64).
    files
        Paths relative to OUT; table files first, then parts.
    table_files
        How many of them are table files.
    """

    rows: pa.Table
    files: list[str]
    table_files: int


_INDEX_FIELDS = [*PHOTOS, FEATURES_TABLE.field("error")]


def index(out: Out, parts: Path, *, look_only: bool = False) -> Index:
    """Read the key columns of the table and of the parts. A part that is damaged is dropped.

    With ``look_only`` nothing is touched, and files that a run is changing now are passed over.
    """
    known = read_json(out.table_file).get("files", {})
    names = [f"features/{name}" for name in sorted(known)]
    table_files = len(names)
    names += sorted(path.relative_to(out.root).as_posix() for path in parts.glob("*.parquet"))
    kept: list[str] = []
    tables = []
    for number, name in enumerate(names):
        try:
            rows = _read_keys(out, name, is_part=number >= table_files, drop=not look_only)
        except MismatchError:
            if not look_only:
                raise
            rows = None
        if rows is not None:
            position = pa.array(np.full(rows.num_rows, len(kept), np.int32))
            rows = rows.append_column("file", position)
            tables.append(rows.append_column("row", pa.array(np.arange(rows.num_rows))))
            kept.append(name)
    schema = pa.schema([*_INDEX_FIELDS, ("file", pa.int32()), ("row", pa.int64())])
    return Index(pa.concat_tables(tables) if tables else schema.empty_table(), kept, table_files)


def _read_keys(out: Out, name: str, *, is_part: bool, drop: bool) -> pa.Table | None:
    wanted = pa.schema(_INDEX_FIELDS)
    columns = [field.name for field in wanted]
    try:
        if is_part:
            return pq.ParquetFile(out.root / name).read(columns)
        columns.remove("split")
        rows = pq.ParquetFile(out.root / name).read(columns)
    except (pa.ArrowInvalid, OSError) as error:
        if is_part:  # the machine went down while it was written; its photos are done again
            if drop:
                log.warning("dropped the damaged part %s: %s", name, error)
                (out.root / name).unlink(missing_ok=True)
            return None
        raise MismatchError(
            f"{out.root / name} is missing or damaged: remove {out.features} and extract again"
        ) from error
    split = Path(name).parent.name.removeprefix("split=")
    split_column = pa.repeat(split, rows.num_rows)
    return rows.add_column(1, "split", split_column).select(wanted.names)


def match(photos: pa.Table, found: Index) -> pa.Table:
    """Join a listing with the rows that there are.

    Returns
    -------
    pa.Table
        One row for each photo, in the listing's order: ``PHOTOS``, ``file`` and ``row`` (null: to
        do), ``error``, and ``moved`` (the row's split or label is another one now).
    """
    keys = ["path", "size", "modified"]
    rows = found.rows
    # Of several rows for one photo the last counts, but a photo that stays unreadable stays put.
    again = pc.and_(
        pc.equal(pc.fill_null(rows["error"], ""), UNREADABLE),
        pc.greater_equal(rows["file"], found.table_files),
    )
    order = pc.if_else(again, -1, rows["file"])
    rows = rows.append_column("order", order)
    best = rows.group_by(keys).aggregate([("order", "max")])
    rows = rows.rename_columns({"split": "old_split", "label": "old_label"}).select(
        [*keys, "old_split", "old_label", "error", "file", "row", "order"]
    )
    best = best.rename_columns({"order_max": "order"})
    rows = rows.join(best, [*keys, "order"], join_type="inner")
    rows = rows.group_by(keys, use_threads=False).aggregate(
        [(name, "first") for name in ("old_split", "old_label", "error", "file", "row")]
    )
    rows = rows.rename_columns(
        {f"{name}_first": name for name in ("old_split", "old_label", "error", "file", "row")}
    )
    numbered = photos.append_column("position", pa.array(np.arange(photos.num_rows)))
    joined = numbered.join(rows, keys, join_type="left outer").sort_by("position")
    same = pc.and_(
        pc.equal(joined["split"], joined["old_split"]),
        pc.equal(joined["label"], joined["old_label"]),
    )
    moved = pc.fill_null(pc.invert(same), False)
    return joined.append_column("moved", moved).select(
        [*PHOTOS.names, "file", "row", "error", "moved"]
    )


def deleted(photos: pa.Table, found: Index) -> pa.Table:
    """Return the table's rows whose path is not in the listing, as ``PHOTOS``."""
    in_table = found.rows.filter(pc.less(found.rows["file"], found.table_files))
    gone = pc.invert(pc.is_in(in_table["path"], photos["path"].combine_chunks()))
    return in_table.filter(gone).select(PHOTOS.names)


# --- parts, on workers -------------------------------------------------------------------------


class PartFile(NamedTuple):
    """Where a task writes, and what it is called."""

    folder: str
    run: str


def new_run() -> str:
    """Return a name for one run of ``extract``."""
    return uuid.uuid4().hex[:8]


def write_part(where: PartFile, task: int, batches: Iterator[pa.RecordBatch]) -> Counts:
    """Write one task's rows as one part. Runs on workers.

    The same task done twice (a retry, speculation) replaces its own part, or, if a photo has
    changed in between, leaves a second one, of which one row counts.
    """
    aside = Path(where.folder, f".{where.run}-{task:06d}-{uuid.uuid4().hex[:8]}")
    rows = rejected = 0
    try:
        with open_parquet(aside, FEATURES_TABLE) as writer:
            for batch in batches:
                writer.write_batch(batch.select(FEATURES_TABLE.names).cast(FEATURES_TABLE))
                rows += batch.num_rows
                rejected += batch.num_rows - batch["error"].null_count
        name = PART_FORMAT.format(run=where.run, task=task, rows=rows, rejected=rejected)
        if rows:
            aside.replace(Path(where.folder, name))
    finally:
        aside.unlink(missing_ok=True)
    return Counts(rows, rejected)


def write_rejected(out: Out) -> dict[str, int]:
    """Write ``OUT/rejected.csv`` and return how many there are of each code."""
    return list_rejected(index(out, out.work / "none").rows, out.rejected)


def list_rejected(rows: pa.Table, path: Path) -> dict[str, int]:
    """Write the rows that have an error as CSV, and return how many there are of each code."""
    bad = rows.filter(pc.is_valid(rows["error"])).select(REJECTED.names)
    bad = bad.sort_by([("split", "ascending"), ("path", "ascending")])
    with atomic_file(path) as part:
        pcsv.write_csv(bad, part)
    counted = bad.group_by("error").aggregate([("path", "count")]).to_pylist()
    return {row["error"]: row["path_count"] for row in sorted(counted, key=lambda r: r["error"])}


def digest(out: Out) -> str:
    """Return one digest of the table's files, as they were when they were written."""
    files = read_json(out.table_file).get("files", {})
    return tree_digest({name: about["sha256"] for name, about in files.items()})
