"""One task of extract: a chunk of the list of photos becomes a part of the table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from pomona.backbone import extract as backbone
from pomona.backbone.spec import BackboneSpec
from pomona.core.parquet import sliced
from pomona.photos.reading import read
from pomona.photos.source import Source
from pomona.pipeline.verification import with_sha256
from pomona.spark.tasks import Answer, at_task
from pomona.workspace import feature_table


@dataclass(frozen=True)
class ExtractTask:
    """Extract chunks of a list of photos into parts. A `pomona.spark.tasks.ChunkTask`."""

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
        spec = at_task(self.spec)
        # Sliced before reading: a worker holds the bytes of one network batch, not of the chunk.
        contents = with_sha256(read(sliced([photos], spec.batch_size), self.source))
        rows = backbone.extract(contents, spec)
        part = self.part._replace(folder=folder)
        return feature_table.write_part(part, number, rows)._asdict()

    def done(self) -> set[int]:
        """Return the chunks whose parts are in place."""
        paths = Path(self.folder).glob(f"{self.part.run}-*")
        return {feature_table.task_of(path.name) for path in paths}

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
