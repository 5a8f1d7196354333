"""From the parts of a run to the files of the table of features."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pomona.core.errors import JobError
from pomona.core.files import atomic_file, sha256, write_json
from pomona.core.parquet import even_bounds, gather, open_parquet, read_chunk
from pomona.core.schema import FEATURES_TABLE, PHOTOS, SPLITS, without
from pomona.workspace import layout
from pomona.workspace.feature_table import Index
from pomona.workspace.layout import Move, Out

ROWS_PER_FILE = 25_000
"""128 MB: a row is 1280 float32 and about 100 bytes."""


# --- from parts to the table -------------------------------------------------------------------


class Compaction(NamedTuple):
    """What must happen for parts and table to become the new table.

    Attributes
    ----------
    plan
        Rows to write: ``PHOTOS``, ``file``, ``row``, in order.
    bounds
        The plan's rows, file by file.
    names
        The new files, relative to ``OUT/features``.
    obsolete
        Table files that go, relative to ``OUT/features``.
    """

    plan: pa.Table
    bounds: list[int]
    names: list[str]
    obsolete: list[str]


def plan_compaction(rows: pa.Table, found: Index) -> Compaction:
    """Decide which files stay and what the new ones hold.

    A table file stays when all its rows do and it is full, or its split has nothing new.

    Parameters
    ----------
    rows
        As `match` returns it, complete.

    Raises
    ------
    JobError
        If a photo has no row: no task may lose one.
    """
    if rows["file"].null_count:
        raise JobError(f"{rows['file'].null_count} photos got no row: run the same command again")
    old = _table_sizes(found)
    stays = np.zeros(len(found.files), np.int64)
    numbers, moved = rows["file"].to_numpy(), rows["moved"].to_numpy()
    np.add.at(stays, numbers[~moved], 1)
    whole = {n for n in range(found.table_files) if stays[n] == old[n]}
    split_of = {n: Path(found.files[n]).parent.name for n in range(found.table_files)}
    kept: set[int] = set()
    for split in SPLITS:
        mine = {n for n in whole if split_of[n] == f"split={split}"}
        in_split = pc.equal(rows["split"], split).to_numpy()
        new = bool((in_split & ~np.isin(numbers, list(mine))).any())
        kept |= {n for n in mine if old[n] >= ROWS_PER_FILE // 2} if new else mine
    plan = rows.filter(pa.array(~np.isin(numbers, list(kept)))).select(
        [*PHOTOS.names, "file", "row"]
    )
    bounds, names = _new_files(plan, next_generation(found))
    gone = set(range(found.table_files)) - kept
    obsolete = [found.files[n].removeprefix("features/") for n in sorted(gone)]
    return Compaction(plan, bounds, names, obsolete)


def _table_sizes(found: Index) -> Any:
    return np.bincount(found.rows["file"].to_numpy(), minlength=len(found.files))


def next_generation(found: Index) -> int:
    """Return the number that new files of the table carry in their names."""
    old = [int(Path(name).stem.split("-")[1]) for name in found.files[: found.table_files]]
    return max(old, default=-1) + 1


def _new_files(plan: pa.Table, generation: int) -> tuple[list[int], list[str]]:
    bounds, names = [0], []
    for split, cuts in cut_by_split(plan, ROWS_PER_FILE):
        bounds += cuts
        names += [
            f"split={split}/part-{generation:05d}-{number:05d}.parquet"
            for number in range(len(cuts))
        ]
    return bounds, names


def cut_by_split(rows: pa.Table, most: int) -> list[tuple[str, list[int]]]:
    """Cut rows that are sorted by split into pieces of at most ``most`` of one split.

    Returns
    -------
    list
        For each split in the rows' order (Test, Training) the ends of its pieces.
    """
    found, first = [], 0
    for split in SPLITS[::-1]:
        count = pc.sum(pc.equal(rows["split"], split)).as_py() or 0
        found.append((split, [first + cut for cut in even_bounds(count, most)[1:]]))
        first += count
    return found


@dataclass(frozen=True)
class WriteFile:
    """Write one file of the new table. Picklable; called on workers.

    Attributes
    ----------
    chunks
        The plan, a chunk for each file.
    root, files
        OUT, and the files that the plan's ``file`` counts.
    names, staged
        The new files, and the folder that they are relative to.
    """

    chunks: str
    root: str
    files: tuple[str, ...]
    names: tuple[str, ...]
    staged: str

    def __call__(self, number: int) -> dict[str, Any]:
        """Return ``name``, ``rows``, ``rejected`` and ``sha256`` of file ``number``."""
        path = Path(self.staged, self.names[number])
        plan = read_chunk(self.chunks, number)
        schema = without(FEATURES_TABLE, "split")
        label = schema.get_field_index("label")
        rejected = 0
        with atomic_file(path) as part, open_parquet(part, schema) as writer:
            for wanted, rows in gather(plan, self.root, self.files, schema.names):
                relabelled = rows.set_column(label, schema.field("label"), wanted["label"])
                rejected += rows.num_rows - rows["error"].null_count
                for batch in relabelled.to_batches():
                    writer.write_batch(batch)
        digest = sha256(path)
        name = self.names[number]
        return {"name": name, "rows": plan.num_rows, "rejected": rejected, "sha256": digest}


def commit_compaction(
    out: Out, done: Compaction, results: list[dict[str, Any]], staged: Path, table: dict[str, Any]
) -> None:
    """Put the new files in place, remove the old ones and the parts, and note both."""
    files = dict(table.get("files", {}))
    for name in done.obsolete:
        files.pop(name, None)
    for result in results:
        files[result["name"]] = {k: result[k] for k in ("rows", "rejected", "sha256")}
    write_json(staged / "_table.json", {**table, "files": files})
    here = staged.relative_to(out.root).as_posix()
    moves: list[Move] = [(None, f"features/{name}") for name in done.obsolete]
    moves += [(f"{here}/{r['name']}", f"features/{r['name']}") for r in results]
    moves.append((f"{here}/_table.json", "features/_table.json"))
    # The parts go with the change: left behind by a kill, they would be taken for newer rows.
    moves += [(None, path.relative_to(out.root).as_posix()) for path in out.work.glob("parts-*")]
    moves.append((None, "_work/plan.json"))
    layout.commit(out, moves)
    shutil.rmtree(out.work, ignore_errors=True)
