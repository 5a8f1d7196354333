"""OUT without the photos, staged in ``OUT/_work`` so that one commit puts all of it in place.

Table, parts of an unfinished extract, ``rejected.csv`` and the manifest are written again; what was
made from the photos is removed. Neither a staged file nor the journal holds the path of a photo
that is forgotten.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pomona.core.files import atomic_file, read_json, sha256, tree_digest, write_json
from pomona.core.parquet import open_parquet
from pomona.core.schema import FEATURES_TABLE, SPLITS, without
from pomona.privacy.occurrences import REMOVED, Occurrences
from pomona.workspace import feature_table
from pomona.workspace.compaction import next_generation, widened
from pomona.workspace.layout import Move, Out


@dataclass
class Change:
    """Files that are staged, and the moves that put them in place."""

    out: Out
    staged: Path  # a folder in ``OUT/_work``
    moves: list[Move] = field(default_factory=list)  # for `pomona.workspace.layout.commit`
    counts: Counter[str] = field(default_factory=Counter)  # files ``rewritten`` and ``removed``

    def remove(self, name: str) -> None:
        """Remove a file or folder of OUT, if it is there."""
        if (self.out.root / name).exists():
            self.moves.append((None, name))
            self.counts["removed"] += 1

    def put(self, name: str) -> Path:
        """Return where to write what becomes a file of OUT."""
        staged = self.staged / f"{len(self.moves):06d}"
        self.moves.append((staged.relative_to(self.out.root).as_posix(), name))
        self.counts["rewritten"] += 1
        return staged


def stage(occurrences: Occurrences, change: Change, *, drop_records: bool) -> None:
    """Stage all of OUT that changes.

    With ``drop_records`` the manifest's records of reduce and train go: they aren't made again.
    """
    _stage_plan(occurrences, change)
    _stage_parts(occurrences, change)
    change.remove(change.out.tuning.name)  # it holds pixels of all photos
    if not occurrences.in_derived:
        return
    files = _stage_table(occurrences, change)
    _stage_manifest(occurrences, files, change, drop_records=drop_records)
    for name in REMOVED:
        change.remove(name)


def _stage_table(occurrences: Occurrences, change: Change) -> dict[str, Any]:
    """Stage the table's files that change, and ``_table.json``; return its entries by file."""
    out, index = change.out, occurrences.index
    table = read_json(out.table_file)
    files = dict(table.get("files", {}))
    generation, counter = next_generation(index), Counter[str]()
    for number, rows in occurrences.rows_by_file.items():
        if number >= index.table_files:
            continue
        old = index.files[number].removeprefix("features/")
        split = old.partition("/")[0]
        about = files.pop(old)
        change.remove(f"features/{old}")
        if about["rows"] == len(rows):
            continue
        new = f"{split}/part-{generation:05d}-{counter[split]:05d}.parquet"
        counter[split] += 1
        staged = change.put(f"features/{new}")
        counts = _copy_without(out.features / old, staged, rows, without(FEATURES_TABLE, "split"))
        files[new] = {**counts, "sha256": sha256(staged)}
    for name in index.lost:
        files.pop(name.removeprefix("features/"))
        change.remove(name)
    if table:
        write_json(change.put("features/_table.json"), {**table, "files": files})
    return files


def _copy_without(
    source: Path, target: Path, rows: npt.NDArray[np.int64], schema: pa.Schema
) -> dict[str, int]:
    """Copy a Parquet file without some rows; the others stay as they are, to the bit."""
    count, rejected, first = 0, 0, 0
    file = pq.ParquetFile(source)
    with atomic_file(target) as part, open_parquet(part, schema) as writer:
        for number in range(file.num_row_groups):
            group = widened(file.read_row_group(number), schema)
            numbers = np.arange(first, first + group.num_rows)
            first += group.num_rows
            kept = group.filter(pa.array(~np.isin(numbers, rows)))
            count += kept.num_rows
            rejected += kept.num_rows - kept["error"].null_count
            for batch in kept.to_batches():
                writer.write_batch(batch)
    return {"rows": count, "rejected": rejected}


def _stage_plan(occurrences: Occurrences, change: Change) -> None:
    """Subtract the photos from the counts of an unfinished extract."""
    plan = read_json(change.out.work / "plan.json")
    if not plan:
        return
    paths, in_table = occurrences.index.rows["path"], occurrences.in_table
    erased = occurrences.erased
    before = set(paths.filter(pa.array(erased & in_table)).to_pylist())
    parts = set(paths.filter(pa.array(erased & ~in_table)).to_pylist())
    todo = _paths_to_do(change.out) & occurrences.paths
    plan["photos"] -= len(before | parts | todo)
    plan["before"] -= len(before - todo)
    write_json(change.put("_work/plan.json"), plan)


def _paths_to_do(out: Out) -> set[str]:
    """Return the photos that an unfinished extract had to do."""
    try:
        with pa.OSFile(str(out.work / "todo.arrow"), "rb") as file:
            return set(pa.ipc.open_file(file).read_all()["path"].to_pylist())
    except (OSError, pa.ArrowInvalid):
        return set()


def _stage_parts(occurrences: Occurrences, change: Change) -> None:
    """Stage the parts of an unfinished extract; all else that killed runs left is removed."""
    out, index = change.out, occurrences.index
    parts = {out.root / name for name in index.files[index.table_files :]}
    for number, rows in occurrences.rows_by_file.items():
        if number >= index.table_files:
            change.remove(index.files[number])
            _stage_part(index.files[number], rows, change)
    for path in sorted(out.work.glob("*")) if out.work.is_dir() else []:
        if path in (change.staged, out.work / "plan.json"):
            continue
        if not any(part.is_relative_to(path) for part in parts):
            change.remove(path.relative_to(out.root).as_posix())
            continue
        for unfinished in sorted(set(path.iterdir()) - parts):  # a task was writing it
            change.remove(unfinished.relative_to(out.root).as_posix())


def _stage_part(name: str, rows: npt.NDArray[np.int64], change: Change) -> None:
    """Stage one part; its name tells its counts, which are known when it is written."""
    run, task, old_rows, _ = Path(name).stem.split("-")
    if int(old_rows) == len(rows):
        return
    spare = change.staged / f"part-{len(change.moves)}"
    counts = _copy_without(change.out.root / name, spare, rows, FEATURES_TABLE)
    new = feature_table.PART_FORMAT.format(run=run, task=int(task), **counts)
    spare.rename(change.put(f"{Path(name).parent.as_posix()}/{new}"))


def _stage_manifest(
    occurrences: Occurrences, files: dict[str, Any], change: Change, *, drop_records: bool
) -> None:
    """Stage ``rejected.csv`` and the record of extract, with the counts of what is left."""
    manifest = read_json(change.out.manifest)
    record = manifest.get("stages", {}).get("extract")
    if not record:
        change.remove("rejected.csv")
        return
    if drop_records:
        for name in ("reduce", "train"):
            manifest["stages"].pop(name, None)
    rows = occurrences.index.rows.filter(pa.array(occurrences.in_table & ~occurrences.erased))
    rejected = change.put("rejected.csv")
    csv_safe = record["settings"].get("csv_safe", False)
    codes = feature_table.list_rejected(rows, rejected, csv_safe=csv_safe)
    record |= {
        "photos": rows.num_rows,
        "splits": {split: pc.sum(pc.equal(rows["split"], split)).as_py() or 0 for split in SPLITS},
        "labels": pc.count_distinct(rows["label"]).as_py(),
        "rejected": codes,
        "digests": {
            "features": tree_digest({name: entry["sha256"] for name, entry in files.items()}),
            "rejected.csv": sha256(rejected),
        },
    }
    write_json(change.put("manifest.json"), manifest)
