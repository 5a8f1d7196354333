"""Compaction: the parts of a run and the old table of features become the new table."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pomona.core.errors import DamagedError, JobError
from pomona.core.files import atomic_file, sha256, write_json
from pomona.core.parquet import even_bounds, gather, open_parquet, read_chunk
from pomona.core.schema import FEATURES_TABLE, PHOTOS, SPLITS, without
from pomona.workspace import layout
from pomona.workspace.feature_table import Index
from pomona.workspace.layout import Move, Out

ROWS_PER_FILE = 25_000
"""Gives files of 128 MB: a row is 1280 float32 and about 100 bytes."""


class Compaction(NamedTuple):
    """A plan of the files to write and to remove; their names are relative to ``OUT/features``."""

    plan: pa.Table  # the rows to write, in order: PHOTOS, file, row
    bounds: list[int]  # where each new file's rows start in the plan, and where the last one's end
    names: list[str]  # the new files
    obsolete: list[str]  # table files to remove


def plan_compaction(rows: pa.Table, index: Index) -> Compaction:
    """Decide from the result of `match` which files stay and what the new ones hold.

    A table file stays if all its rows stay and it is at least half full, or if its split has no new
    rows. Raises JobError if a photo has no row: tasks must not lose any.
    """
    if rows["file"].null_count:
        raise JobError(f"{rows['file'].null_count} photos got no row: run the same command again")
    kept = _files_that_stay(rows, index)
    numbers = rows["file"].to_numpy()
    plan = rows.filter(pa.array(~np.isin(numbers, list(kept)))).select(
        [*PHOTOS.names, "file", "row"]
    )
    bounds, names = _new_files(plan, next_generation(index))
    gone = set(range(index.table_files)) - kept
    obsolete = [index.files[n].removeprefix("features/") for n in sorted(gone)]
    obsolete += [name.removeprefix("features/") for name in index.lost]
    return Compaction(plan, bounds, names, obsolete)


def _files_that_stay(rows: pa.Table, index: Index) -> set[int]:
    """Return the numbers of the table files that are neither rewritten nor removed."""
    numbers, moved = rows["file"].to_numpy(), rows["moved"].to_numpy()
    before = np.bincount(index.rows["file"].to_numpy(), minlength=len(index.files))
    staying = np.bincount(numbers[~moved], minlength=len(index.files))
    whole = {n for n in range(index.table_files) if staying[n] == before[n]}
    kept: set[int] = set()
    for split in SPLITS:
        of_split = {n for n in whole if Path(index.files[n]).parent.name == f"split={split}"}
        in_split = pc.equal(rows["split"], split).to_numpy()
        has_new = bool((in_split & ~np.isin(numbers, list(of_split))).any())
        kept |= {n for n in of_split if not has_new or before[n] >= ROWS_PER_FILE // 2}
    return kept


def next_generation(index: Index) -> int:
    """Return the generation that new table files carry in their names: one above the highest."""
    generations = [int(Path(name).stem.split("-")[1]) for name in index.files[: index.table_files]]
    return max(generations, default=-1) + 1


def _new_files(plan: pa.Table, generation: int) -> tuple[list[int], list[str]]:
    bounds, names = [0], []
    for split, cuts in cut_by_split(plan, ROWS_PER_FILE):
        bounds += cuts
        stem = f"split={split}/part-{generation:05d}"
        names += [f"{stem}-{number:05d}.parquet" for number in range(len(cuts))]
    return bounds, names


def cut_by_split(rows: pa.Table, most: int) -> list[tuple[str, list[int]]]:
    """Cut rows, sorted by split, into pieces of at most ``most`` rows of one split.

    Returns for each split, in the rows' order (Test, Training), the ends of its pieces.
    """
    pieces, first = [], 0
    for split in SPLITS[::-1]:
        count = pc.sum(pc.equal(rows["split"], split)).as_py() or 0
        pieces.append((split, [first + cut for cut in even_bounds(count, most)[1:]]))
        first += count
    return pieces


@dataclass(frozen=True)
class WriteFile:
    """Write one file of the new table. Picklable; runs on workers."""

    chunks: str  # the file with the plan, one chunk for each new file
    root: str  # OUT
    files: tuple[str, ...]  # the files that the plan's column `file` counts
    names: tuple[str, ...]  # the new files, relative to `staged`
    staged: str

    def __call__(self, number: int) -> dict[str, Any]:
        """Return ``name``, ``rows``, ``rejected`` and ``sha256`` of file ``number``.

        Or ``damaged``: the files that can't be read.
        """
        try:
            return self._write(number)
        except DamagedError as error:
            return {"damaged": list(error.files)}

    def _write(self, number: int) -> dict[str, Any]:
        path = Path(self.staged, self.names[number])
        plan = read_chunk(self.chunks, number)
        schema = without(FEATURES_TABLE, "split")
        rejected = 0
        with atomic_file(path) as part, open_parquet(part, schema) as writer:
            for wanted, rows in gather(plan, self.root, self.files, schema.names):
                label = rows.schema.get_field_index("label")
                relabelled = rows.set_column(label, schema.field("label"), wanted["label"])
                rejected += rows.num_rows - rows["error"].null_count
                for batch in widened(relabelled, schema).to_batches():
                    writer.write_batch(batch)
        name, digest = self.names[number], sha256(path)
        return {"name": name, "rows": plan.num_rows, "rejected": rejected, "sha256": digest}


def widened(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the columns of the schema; one that a table of an older Pomona lacks is null."""
    for field in schema:
        if field.name not in rows.column_names:
            rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    return rows.select(schema.names).cast(schema)


def commit_compaction(
    out: Out, plan: Compaction, results: list[dict[str, Any]], staged: Path, table: dict[str, Any]
) -> None:
    """Make the new files the table, and remove obsolete files and parts: all or nothing.

    ``results`` is what `WriteFile` returned for each new file, ``staged`` the folder in OUT that
    holds them, ``table`` the content of ``_table.json``, whose ``files`` are brought up to date.
    """
    files = {n: about for n, about in table.get("files", {}).items() if n not in plan.obsolete}
    for result in results:
        files[result["name"]] = {k: result[k] for k in ("rows", "rejected", "sha256")}
    write_json(staged / "_table.json", {**table, "files": files})
    folder = staged.relative_to(out.root).as_posix()
    moves: list[Move] = [(None, f"features/{name}") for name in plan.obsolete]
    moves += [(f"{folder}/{r['name']}", f"features/{r['name']}") for r in results]
    moves.append((f"{folder}/_table.json", "features/_table.json"))
    # The parts go in the same commit: if a kill left them behind, they would count as newer rows.
    moves += [(None, path.relative_to(out.root).as_posix()) for path in out.work.glob("parts-*")]
    moves.append((None, "_work/plan.json"))
    layout.commit(out, moves)
    shutil.rmtree(out.work, ignore_errors=True)
