"""The engine Spark: tasks run on executors."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pomona.backbone.spec import BackboneSpec
from pomona.engine.engine import Answer, ChunkTask, Poll, Task
from pomona.photos.source import Source
from pomona.spark import executors, resources
from pomona.spark.session import Cluster, session


class SparkEngine:
    """Runs tasks through Spark. An `pomona.engine.engine.Engine`.

    It uses the active session, or starts one when it is first needed, which ends with the engine,
    or with ``keep`` where that is given.
    """

    most_photos = 512
    """About five seconds of work: the gap between tasks is 0.08 s, since the weights are sent with
    each."""

    def __init__(
        self, cluster: Cluster, device: str = "cpu", keep: contextlib.ExitStack | None = None
    ) -> None:
        self._cluster = replace(cluster, master=resources.local_master(cluster.master, device))
        self._own = contextlib.ExitStack()
        self._keep = keep or self._own

    def __enter__(self) -> SparkEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._own.close()

    @cached_property
    def session(self) -> Any:
        """The Spark session."""
        return self._keep.enter_context(session(self._cluster))

    def start(self) -> None:
        """Start the session."""
        self.session  # noqa: B018

    @property
    def slots(self) -> int:
        """How many tasks run at once."""
        return resources.slots(self.session)

    def fit(self, spec: BackboneSpec) -> BackboneSpec:
        """Return the spec with one task slot's share."""
        return resources.fit_spec(spec, self.session)

    def check(self, spec: BackboneSpec, source: Source, paths: list[str]) -> None:
        """Check what executors have and see."""
        executors.check(self.session, spec.backend, source, paths)

    def run_tasks(
        self, task: Task, count: int, folder: Path, poll: Poll | None = None
    ) -> list[Answer]:
        """Run tasks on executors, or on the driver if they don't see the folder."""
        return executors.runner(self.session, folder)(task, count, poll)

    def run_chunks(
        self, task: ChunkTask, numbers: Sequence[int], folder: Path, poll: Poll | None = None
    ) -> None:
        """Run chunks on executors, whether they see the folder or not."""
        executors.run_chunks(self.session, task, numbers, folder, poll)
