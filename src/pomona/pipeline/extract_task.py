"""The task of the stage ``extract``: photos of a chunk become a part. Runs on workers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from pomona.backbone.extract import extract
from pomona.backbone.spec import BackboneSpec
from pomona.core.parquet import sliced
from pomona.photos.reading import read
from pomona.photos.source import Source
from pomona.spark.tasks import Answer, at_task
from pomona.workspace.feature_table import PartFile, task_of, write_part


@dataclass(frozen=True)
class ExtractTask:
    """Extract chunks of a list of photos into parts. A `ChunkTask`."""

    chunks: str
    source: Source
    spec: BackboneSpec
    part: PartFile

    @property
    def folder(self) -> str:
        """The folder of the parts."""
        return self.part.folder

    def write(self, photos: pa.RecordBatch, number: int, folder: str) -> Answer:
        """Write the part of chunk ``number``. Runs on workers."""
        spec = at_task(self.spec)
        # Sliced before reading: a worker holds the bytes of one network batch, not of the chunk.
        rows = extract(read(sliced([photos], spec.batch_size), self.source), spec)
        return write_part(self.part._replace(folder=folder), number, rows)._asdict()

    def done(self) -> set[int]:
        """Return the chunks whose parts are in place."""
        return {task_of(path.name) for path in Path(self.folder).glob(f"{self.part.run}-*")}

    def careful(self) -> ExtractTask:
        """Return the task with photos decoded in child processes."""
        return replace(self, spec=replace(self.spec, guard="child"))


PHOTOS_PER_TASK = 512
"""About five seconds of work: what a killed task loses, and the step of the progress shown. The
gap between tasks is 0.08 s, since the weights are sent with each."""
MOST_TASKS = 50_000
"""What Spark's scheduler handles with ease; above it tasks grow."""


def photos_per_task(todo: int, slots: int) -> int:
    """Return a task's size such that tasks are short, not too many, and all slots end together.

    >>> photos_per_task(100, 2), photos_per_task(16_525, 2), photos_per_task(100_000_000, 64)
    (8, 487, 1999)
    """
    share = -(-todo // (8 * slots))
    most = max(8, min(PHOTOS_PER_TASK, share), -(-todo // MOST_TASKS))
    rounds = -(-todo // (most * slots))
    return max(8, -(-todo // (rounds * slots)))
