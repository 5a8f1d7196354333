"""The table of features on disk: which photos are done, which are to do, and the parts of a run.

While ``extract`` runs, each task writes one *part* to ``OUT/_work/parts-…`` under a temporary name
and renames it at the end, so that a part with its final name is complete. At the end
(`pomona.workspace.compaction`) parts and table become the new table: files of about 128 MB, rows
sorted by path, one folder for each split.

Workers that see the driver's OUT write there. Others write their part to a folder of their own, it
comes back through Spark, and the driver writes the table (`pomona.spark.tasks`,
`pomona.spark.executors`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from pomona.core.errors import DamagedError
from pomona.core.files import atomic_file, put_in_place, read_json, tree_digest
from pomona.core.parquet import open_parquet
from pomona.core.printable import cells
from pomona.core.schema import FEATURES_TABLE, PHOTOS, REJECTED, UNREADABLE
from pomona.workspace.layout import Out

log = logging.getLogger("pomona")

PART_FORMAT = "{run}-{task:06d}-{rows}-{rejected}.parquet"
"""A part's name holds its counts, so that listing the folder is enough to show progress."""


def task_of(name: str) -> int:
    """Return the number of the task that wrote a part, from the part's name."""
    return int(name.split("-")[1])


def parts_folder(out: Out, fingerprint: dict[str, object]) -> Path:
    """Return the folder for the parts of one spec.

    A process that outlives its killed run can't write into the parts of a run with another spec.
    """
    name = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
    return out.work / f"parts-{name}"


class Counts(NamedTuple):
    """Rows in parts."""

    done: int = 0
    rejected: int = 0


def count_parts(folder: Path, run: str = "") -> Counts:
    """Count the rows in a folder's parts (with ``run``: of that run), by the parts' names."""
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
    """Where the row of each photo lies."""

    rows: pa.Table  # PHOTOS, error, file (index into `files`, int32), row (int64)
    files: list[str]  # paths relative to OUT: table files first, then parts
    table_files: int  # the number of table files among them
    lost: Sequence[str] = ()  # table files that can't be read


KEYS = ["path", "size", "modified"]
"""The columns that say whether a photo is still the one that a row was made from."""

_INDEX_FIELDS = [*PHOTOS, FEATURES_TABLE.field("error")]


def index(
    out: Out,
    parts: Path,
    *,
    damaged: Literal["refuse", "skip", "drop"] = "refuse",
    unreadable: Collection[str] = (),
) -> Index:
    """Read the key columns of the table and of the parts.

    What becomes of files that can't be read, or that the caller knows to be ``unreadable``:

    - ``refuse``: a part is removed, since its photos are extracted again; a table file raises
      DamagedError.
    - ``skip``: none is removed. A run may be changing them.
    - ``drop``: a part is removed; a table file is left out and noted in ``lost``, for a caller who
      then writes the table anew.
    """
    names = [f"features/{name}" for name in sorted(read_json(out.table_file).get("files", {}))]
    in_table = len(names)
    names += sorted(path.relative_to(out.root).as_posix() for path in parts.glob("*.parquet"))
    kept: list[str] = []
    lost: list[str] = []
    tables = []
    for number, name in enumerate(names):
        rows = None if name in unreadable else _read_keys(out, name)
        if rows is not None:
            position = pa.array(np.full(rows.num_rows, len(kept), np.int32))
            rows = rows.append_column("file", position)
            tables.append(rows.append_column("row", pa.array(np.arange(rows.num_rows))))
            kept.append(name)
        elif number < in_table:
            _note_lost(out, name, damaged)
            lost.append(name)
        elif damaged != "skip":
            (out.root / name).unlink(missing_ok=True)
    schema = pa.schema([*_INDEX_FIELDS, ("file", pa.int32()), ("row", pa.int64())])
    rows = pa.concat_tables(tables) if tables else schema.empty_table()
    return Index(rows, kept, in_table - len(lost), lost)


def _note_lost(out: Out, name: str, damaged: str) -> None:
    if damaged == "refuse":
        raise DamagedError(
            f"{out.root / name} is missing or damaged: the same pomona extract again makes its "
            "rows anew",
            name,
        )
    log.warning("left out %s, which is missing or damaged", name)


def _read_keys(out: Out, name: str) -> pa.Table | None:
    """Return the key columns of one file, or None if it can't be read."""
    wanted = pa.schema(_INDEX_FIELDS)
    columns = [field.name for field in wanted]
    of_table = name.startswith("features/")
    if of_table:
        columns.remove("split")
    try:
        with pq.ParquetFile(out.root / name, page_checksum_verification=True) as file:
            rows = file.read(columns)
    except (pa.ArrowException, OSError) as error:
        log.warning("%s can't be read: %s", name, error)
        return None
    if not of_table:
        return rows
    split = pa.repeat(Path(name).parent.name.removeprefix("split="), rows.num_rows)
    return rows.add_column(1, "split", split).select(wanted.names)


def match(photos: pa.Table, existing: Index) -> pa.Table:
    """Join a listing with the rows that exist.

    Returns one row for each photo, in the listing's order: ``PHOTOS``, ``file`` and ``row`` (null:
    not extracted yet), ``error``, and ``moved`` (whether its split or label has changed).
    """
    numbered = photos.append_column("position", pa.array(np.arange(photos.num_rows)))
    joined = numbered.join(_latest_rows(existing), KEYS, join_type="left outer").sort_by("position")
    same = pc.and_(
        pc.equal(joined["split"], joined["old_split"]),
        pc.equal(joined["label"], joined["old_label"]),
    )
    joined = joined.append_column("moved", pc.fill_null(pc.invert(same), False))
    return joined.select([*PHOTOS.names, "file", "row", "error", "moved"])


def _latest_rows(existing: Index) -> pa.Table:
    """Return one row for each photo (`KEYS`): old_split, old_label, error, file, row."""
    rows = existing.rows
    # Of several rows for one photo the last counts. But a photo that is still unreadable keeps its
    # row in the table, which then needn't be rewritten.
    again = pc.and_(
        pc.equal(pc.fill_null(rows["error"], ""), UNREADABLE),
        pc.greater_equal(rows["file"], existing.table_files),
    )
    rows = rows.append_column("order", pc.if_else(again, -1, rows["file"]))
    latest = rows.group_by(KEYS).aggregate([("order", "max")])
    latest = latest.rename_columns({"order_max": "order"})
    rows = rows.join(latest, [*KEYS, "order"], join_type="inner")
    columns = ["split", "label", "error", "file", "row"]
    rows = rows.group_by(KEYS, use_threads=False).aggregate([(name, "first") for name in columns])
    names = {f"{name}_first": name for name in columns}
    return rows.rename_columns(names | {"split_first": "old_split", "label_first": "old_label"})


def deleted(photos: pa.Table, existing: Index) -> pa.Table:
    """Return the photos of the table whose path is not in the listing, as ``PHOTOS``."""
    in_table = existing.rows.filter(pc.less(existing.rows["file"], existing.table_files))
    gone = pc.invert(pc.is_in(in_table["path"], photos["path"].combine_chunks()))
    return in_table.filter(gone).select(PHOTOS.names)


class PartFile(NamedTuple):
    """The folder that a task writes its part to, and the name of the run."""

    folder: str
    run: str


def new_run() -> str:
    """Return a new name for a run of ``extract``."""
    return uuid.uuid4().hex[:8]


def write_part(part: PartFile, task: int, batches: Iterator[pa.RecordBatch]) -> Counts:
    """Write one task's rows as one part. Runs on workers.

    A task that runs twice (a retry, speculative execution) replaces its own part. If a photo has
    changed meanwhile, it may leave a second part; of two rows for one photo the later one counts.
    """
    # The name holds the counts, so that it is known at the end only.
    unfinished = Path(part.folder, f".{part.run}-{task:06d}-{uuid.uuid4().hex[:8]}")
    rows = rejected = 0
    try:
        with open_parquet(unfinished, FEATURES_TABLE) as writer:
            for batch in batches:
                writer.write_batch(batch.select(FEATURES_TABLE.names).cast(FEATURES_TABLE))
                rows += batch.num_rows
                rejected += batch.num_rows - batch["error"].null_count
        name = PART_FORMAT.format(run=part.run, task=task, rows=rows, rejected=rejected)
        if rows:
            put_in_place(unfinished, Path(part.folder, name))
    finally:
        unfinished.unlink(missing_ok=True)
    return Counts(rows, rejected)


def write_rejected(out: Out, *, csv_safe: bool = False) -> dict[str, int]:
    """Write ``OUT/rejected.csv`` and return the number of photos for each error code."""
    return list_rejected(index(out, out.work / "none").rows, out.rejected, csv_safe=csv_safe)


def list_rejected(rows: pa.Table, path: Path, *, csv_safe: bool = False) -> dict[str, int]:
    """Write the rows with an error as CSV, and return the number of rows for each error code.

    Texts are written as `pomona.core.printable.cell` returns them.
    """
    bad = rows.filter(pc.is_valid(rows["error"])).select(REJECTED.names)
    bad = bad.sort_by([("split", "ascending"), ("path", "ascending")])
    shown = {name: cells(bad[name], csv_safe=csv_safe) for name in REJECTED.names}
    with atomic_file(path) as part:
        pcsv.write_csv(pa.table(shown), part)
    counted = bad.group_by("error").aggregate([("path", "count")]).to_pylist()
    return {row["error"]: row["path_count"] for row in sorted(counted, key=lambda r: r["error"])}


def read_rejected(path: Path) -> pa.Table:
    """Read what `list_rejected` wrote, as `pomona.core.schema.REJECTED`."""
    return pcsv.read_csv(
        path,
        parse_options=pcsv.ParseOptions(newlines_in_values=True),
        convert_options=pcsv.ConvertOptions(column_types=REJECTED),  # a label may be 007 or NA
    )


def digest(out: Out) -> str:
    """Return one digest of the table's files, from the digests noted when they were written."""
    files = read_json(out.table_file).get("files", {})
    return tree_digest({name: about["sha256"] for name, about in files.items()})
