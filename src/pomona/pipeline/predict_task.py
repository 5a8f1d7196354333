"""The task of the stage ``predict``: photos of a chunk become a Parquet file of answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pomona.core.files import atomic_file
from pomona.model.recogniser import ANSWERS, Recogniser, recognise
from pomona.photos.reading import read, with_content
from pomona.photos.source import MAX_BYTES, Source
from pomona.spark.tasks import at_task

ROWS = pa.schema([("path", pa.string()), *ANSWERS])
"""An answer of `predict`; ``path`` is the argument, with the rest of the way for a folder."""


@dataclass(frozen=True)
class PredictTask:
    """Answer chunks of photos into Parquet files. A `pomona.spark.tasks.ChunkTask`."""

    chunks: str
    sources: tuple[Source | None, ...]
    recogniser: Recogniser
    folder: str

    def write(self, photos: pa.RecordBatch, number: int, folder: str) -> dict[str, Any]:
        """Write the answers of chunk ``number``. Runs on workers."""
        recogniser = replace(self.recogniser, spec=at_task(self.recogniser.spec))
        path = Path(folder, part_name(number))
        with atomic_file(path) as part, pq.ParquetWriter(part, ROWS) as writer:
            for batch in answers(photos, self.sources[number], recogniser):
                writer.write_batch(batch)
        return {}

    def done(self) -> set[int]:
        """Return the chunks whose answers are in place."""
        names = {path.name for path in Path(self.folder).glob("part-*.parquet")}
        return {number for number in range(len(self.sources)) if part_name(number) in names}

    def careful(self) -> PredictTask:
        """Return the task with photos decoded in child processes."""
        spec = replace(self.recogniser.spec, guard="child")
        return replace(self, recogniser=replace(self.recogniser, spec=spec))


def part_name(number: int) -> str:
    """Return the name of the file with a chunk's answers."""
    return f"part-{number:05d}.parquet"


def answers(
    photos: pa.RecordBatch, source: Source | None, recogniser: Recogniser
) -> Iterator[pa.RecordBatch]:
    """Yield the answers for photos of one source, as `ROWS`, a few at a time. Runs on workers."""
    size = recogniser.spec.batch_size
    batches = (photos.slice(start, size) for start in range(0, photos.num_rows, size))
    with_bytes = _standard_input(batches) if source is None else read(batches, source)
    for batch in recognise(with_bytes, recogniser):
        columns = [batch[name] for name in ("shown", *ANSWERS.names)]
        yield pa.RecordBatch.from_arrays(columns, schema=ROWS)


def _standard_input(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        content = sys.stdin.buffer.read(MAX_BYTES + 1)
        yield with_content(batch, [content] * batch.num_rows)
