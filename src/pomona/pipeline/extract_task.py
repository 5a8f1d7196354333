"""The task of the stage ``extract``: photos of a chunk become a part. Runs on workers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from pomona.backbone.extract import extract
from pomona.backbone.spec import BackboneSpec
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
        size = spec.batch_size
        batches = (photos.slice(start, size) for start in range(0, photos.num_rows, size))
        rows = extract(read(batches, self.source), spec)
        return write_part(self.part._replace(folder=folder), number, rows)._asdict()

    def done(self) -> set[int]:
        """Return the chunks whose parts are in place."""
        return {task_of(path.name) for path in Path(self.folder).glob(f"{self.part.run}-*")}

    def careful(self) -> ExtractTask:
        """Return the task with photos decoded in child processes."""
        return replace(self, spec=replace(self.spec, guard="child"))
