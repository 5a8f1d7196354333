"""The option ``--verify`` of extract: digests instead of trust in names, sizes and times."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pomona.core.errors import DamagedError
from pomona.core.files import read_json, sha256
from pomona.core.parquet import even_bounds, gather, read_chunk, sliced, write_chunks
from pomona.core.progress import OnTick, Tick
from pomona.engine.engine import Engine
from pomona.photos.reading import read
from pomona.photos.source import Source
from pomona.workspace.feature_table import Index
from pomona.workspace.layout import Out

READ_AT_ONCE = 8
PHOTOS_PER_TASK = 4096


def with_sha256(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Add the column ``sha256`` to batches with ``content``: hexadecimal, or null. On workers."""
    for batch in batches:
        contents = (value.as_buffer() for value in batch["content"])
        digests = [None if c is None else hashlib.sha256(c).hexdigest() for c in contents]
        yield batch.append_column("sha256", pa.array(digests, pa.string()))


def damaged_files(out: Out, on_tick: OnTick) -> list[str]:
    """Return the files of the table, relative to OUT, whose digest isn't the one noted for them."""
    files = read_json(out.table_file).get("files", {})
    damaged = []
    for number, (name, about) in enumerate(sorted(files.items())):
        on_tick(Tick("verify", number, len(files)))
        path = out.features / name
        if not path.is_file() or sha256(path) != about["sha256"]:
            damaged.append(f"features/{name}")
    return damaged


@dataclass(frozen=True)
class VerifyTask:
    """Compare photos with the digests of their rows. Picklable. Runs on workers."""

    chunks: str  # with PHOTOS, file and row of each photo to look at
    root: str  # OUT
    files: tuple[str, ...]
    source: Source

    def __call__(self, number: int) -> dict[str, Any]:
        """Return ``changed``, the photos' positions in the chunk; or ``damaged`` files."""
        chunk = read_chunk(self.chunks, number)
        photos = with_sha256(read(sliced([chunk], READ_AT_ONCE), self.source))
        now = [digest for batch in photos for digest in batch["sha256"].to_pylist()]
        before: list[str | None] = []
        try:
            for _, rows in gather(chunk, self.root, self.files, ["path", "sha256"]):
                has_digests = "sha256" in rows.column_names
                before += rows["sha256"].to_pylist() if has_digests else [None] * rows.num_rows
        except DamagedError as error:
            return {"damaged": list(error.files)}
        pairs = zip(now, before, strict=True)
        # A photo that can't be read now keeps its row: it may be out of reach for a while.
        changed = [n for n, (new, old) in enumerate(pairs) if new is not None and new != old]
        return {"changed": changed}


def changed_photos(
    out: Out,
    source: Source,
    rows: pa.Table,
    index: Index,
    engine: Engine,
    on_tick: OnTick,
) -> tuple[npt.NDArray[np.bool_], set[str]]:
    """Return which of the rows of `match` hold features of other bytes, and damaged files."""
    changed = np.zeros(rows.num_rows, bool)
    positions = np.flatnonzero(pc.is_valid(rows["file"]).to_numpy())
    bounds = even_bounds(len(positions), PHOTOS_PER_TASK)
    chunks = out.work / "verify.arrow"
    write_chunks(chunks, rows.take(pa.array(positions)), bounds)
    task = VerifyTask(str(chunks), str(out.root), tuple(index.files), source)
    on_tick(Tick("verify", 0, len(positions)))
    answers = engine.run_tasks(task, len(bounds) - 1, out.root)
    damaged = {name for answer in answers for name in answer.get("damaged", ())}
    for start, answer in zip(bounds, answers, strict=False):
        changed[positions[start + np.array(answer.get("changed", []), int)]] = True
    return changed, damaged
