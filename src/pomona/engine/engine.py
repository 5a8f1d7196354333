"""Tasks, and the engines that run them.

A task gets a number, reads its input from files and returns a few bytes: neither photos nor
features pass through an engine. It is picklable, of an installed module, and may run more than
once for a number. `pomona.engine.processes` runs tasks on this machine, `pomona.spark.engine`
wherever Spark does. Which one a stage uses makes no difference to what it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from pomona.backbone.spec import BackboneSpec
from pomona.core.parquet import read_chunk
from pomona.photos.source import Source

Answer = dict[str, Any]
"""What a task returns: anything that JSON holds."""

Task = Callable[[int], Answer]
Poll = Callable[[], None]
POLL_SECONDS = 0.5

GPU_WORKERS = 2
"""Workers for one GPU of this machine: one computes while the other decodes. Each has a CUDA
context of its own, so there isn't one per core."""


class ChunkTask(Protocol):
    """Turn chunks of a list into files of one folder. Picklable."""

    @property
    def chunks(self) -> str:
        """File of the list, as written by `pomona.core.parquet.write_chunks`."""

    @property
    def folder(self) -> str:
        """Where the files belong."""

    def write(self, photos: pa.RecordBatch, number: int, folder: str) -> Answer:
        """Write the files of chunk ``number`` into ``folder``. Runs on workers."""

    def done(self) -> set[int]:
        """Return the numbers of the chunks whose files are in place. Runs on the driver."""

    def with_spec(self, change: Callable[[BackboneSpec], BackboneSpec]) -> ChunkTask:
        """Return the same task with its spec changed."""


@dataclass(frozen=True)
class InPlace:
    """Run a task's chunks where workers see its list and folder. Picklable; runs on workers."""

    task: ChunkTask

    def __call__(self, number: int) -> Answer:
        """Write the files of chunk ``number`` in place."""
        return self.task.write(read_chunk(self.task.chunks, number), number, self.task.folder)


def in_child(spec: BackboneSpec) -> BackboneSpec:
    """Return the spec with photos decoded in child processes."""
    return replace(spec, guard="child")


class Engine(Protocol):
    """Runs tasks on workers. Any method may be the first: it starts what it needs."""

    most_photos: int
    """Photos that a task of ``extract`` holds at most."""

    def start(self) -> None:
        """Start the workers; a JobError or MissingError if that fails."""

    @property
    def slots(self) -> int:
        """How many tasks run at once."""

    def fit(self, spec: BackboneSpec) -> BackboneSpec:
        """Return the spec with one worker's share of threads and GPU memory."""

    def check(self, spec: BackboneSpec, source: Source, paths: list[str]) -> None:
        """Check that workers have what a run needs, and read the first of ``paths`` that we can.

        Raises RequestError or SourceError.
        """

    def run_tasks(
        self, task: Task, count: int, folder: Path, poll: Poll | None = None
    ) -> list[Answer]:
        """Call ``task(0) … task(count - 1)`` and return the answers in that order.

        The tasks read and write in ``folder``. ``poll`` is called twice a second on this thread.
        Raises JobError if a task fails for a reason of its own; what others did is kept.
        """

    def run_chunks(
        self, task: ChunkTask, numbers: Sequence[int], folder: Path, poll: Poll | None = None
    ) -> None:
        """Run chunks. A photo that kills or stalls a worker costs itself: it is ``crashed``."""
