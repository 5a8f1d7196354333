"""One task of extract: a chunk of the list of photos becomes a part of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from pomona.backbone import extract as backbone
from pomona.backbone.spec import BackboneSpec
from pomona.core.parquet import even_bounds, sliced
from pomona.engine.engine import Answer
from pomona.photos.reading import read
from pomona.photos.source import Source
from pomona.pipeline.verification import with_sha256
from pomona.workspace import feature_table


@dataclass(frozen=True)
class ExtractTask:
    """Extract chunks of a list of photos into parts. A `pomona.engine.engine.ChunkTask`."""

    chunks: str
    source: Source
    spec: BackboneSpec
    part: feature_table.PartFile

    @property
    def folder(self) -> str:
        """The folder of the parts."""
        return self.part.folder

    def write(self, photos: pa.RecordBatch, number: int, folder: str) -> Answer:
        """Write the part of chunk ``number``. Runs on workers."""
        spec = self.spec
        # Sliced before reading: a worker holds the bytes of one network batch, not of the chunk.
        contents = with_sha256(read(sliced([photos], spec.batch_size), self.source))
        rows = backbone.extract(contents, spec)
        part = self.part._replace(folder=folder)
        return feature_table.write_part(part, number, rows)._asdict()

    def done(self) -> set[int]:
        """Return the chunks whose parts are in place."""
        paths = Path(self.folder).glob(f"{self.part.run}-*")
        return {feature_table.task_of(path.name) for path in paths}

    def with_spec(self, change: Callable[[BackboneSpec], BackboneSpec]) -> ExtractTask:
        """Return the task with another spec."""
        return replace(self, spec=change(self.spec))


MOST_TASKS = 50_000
"""What Spark's scheduler handles with ease; above it tasks grow."""

FIRST = 16
"""Photos of each slot's first task: progress is seen, and something is kept, after a moment."""


def photos_per_task(todo: int, slots: int, most: int) -> int:
    """Return a task's size such that tasks are short, not too many, and all slots end together.

    >>> photos_per_task(100, 2, 512), photos_per_task(16_525, 2, 512)
    (8, 487)
    >>> photos_per_task(100_000_000, 64, 512)
    1999
    """
    share = -(-todo // (8 * slots))
    most = max(8, min(most, share), -(-todo // MOST_TASKS))
    rounds = -(-todo // (most * slots))
    return max(8, -(-todo // (rounds * slots)))


def task_bounds(todo: int, slots: int, most: int) -> list[int]:
    """Return the bounds of the tasks' photos: small ones first, then even ones.

    >>> task_bounds(100, 2, 512)[:5], task_bounds(1000, 2, 512)[:5], task_bounds(0, 2, 512)
    ([0, 7, 15, 23, 30], [0, 16, 32, 92, 153], [0])
    """
    if not todo:
        return [0]
    first = slots * FIRST
    if todo < 8 * first:
        return even_bounds(todo, photos_per_task(todo, slots, most))
    rest = todo - first
    ends = even_bounds(rest, photos_per_task(rest, slots, most))
    return [*range(0, first, FIRST), *(first + end for end in ends)]
