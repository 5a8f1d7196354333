"""The engine of processes: tasks run on this machine, without Spark and without Java.

The pool is loky's. Unlike multiprocessing's it starts processes that don't import the caller's
``__main__``, so that it serves notebooks, ``python -c`` and scripts without a main guard.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from pomona.backbone.spec import BackboneSpec
from pomona.core.cpus import available_cpus
from pomona.core.errors import JobError, PomonaError, first_line
from pomona.engine.engine import (
    GPU_WORKERS,
    POLL_SECONDS,
    Answer,
    ChunkTask,
    InPlace,
    Poll,
    Task,
    in_child,
)
from pomona.photos.source import Source

log = logging.getLogger("pomona")

ATTEMPTS = 4
"""How often a task may lose its worker."""
DEATHS = 3
"""After so many lost workers all photos are decoded in child processes."""

ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
)
"""Libraries of a worker leave the other cores to the other workers."""


class Processes:
    """Runs tasks in processes of this machine, one for each core. An `Engine`.

    Parameters
    ----------
    workers
        Their number; by default one for each core that this process may use, on a GPU two.
    log_file
        Takes what workers print: reasons of unreadable photos, tracebacks.
    device
        ``cpu`` or ``cuda``.
    """

    most_photos = 128  # a second of work, so that all workers end together

    def __init__(
        self, workers: int | None = None, log_file: Path | None = None, device: str = "cpu"
    ) -> None:
        cpus = available_cpus()
        self.slots = workers or (cpus if device == "cpu" else min(GPU_WORKERS, cpus))
        self._log_file = log_file
        self._pool: Any = None
        self.replaced = 0
        """Workers that died and were replaced."""

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def start(self) -> None:
        """Start the workers and don't wait for them."""
        for _ in range(self.slots):
            self._submit(_nothing, 0)

    def fit(self, spec: BackboneSpec) -> BackboneSpec:
        """Return the spec with one worker's share."""
        if spec.device == "cpu":
            return replace(spec, threads=1)
        threads = max(2, available_cpus() // self.slots)
        return replace(spec, threads=threads, memory_share=0.9 / self.slots)

    def check(self, spec: BackboneSpec, source: Source, paths: list[str]) -> None:
        """Do nothing: workers have and see what this process does."""

    def run_tasks(
        self, task: Task, count: int, folder: Path, poll: Poll | None = None
    ) -> list[Answer]:
        """Call ``task(0) … task(count - 1)``; a single task runs in this process."""
        if count == 1:
            return [task(0)]
        answers: dict[int, Answer] = {}
        numbers, lost = list(range(count)), Counter[int]()
        while numbers:
            answers |= self._run(lambda _: task, numbers, poll, lost)
            numbers = [number for number in numbers if number not in answers]
        return [answers[number] for number in range(count)]

    def run_chunks(
        self, task: ChunkTask, numbers: Sequence[int], folder: Path, poll: Poll | None = None
    ) -> None:
        """Run chunks, decoding in child processes those that have lost a worker."""
        watched, careful = InPlace(task.with_spec(_watched)), InPlace(task.with_spec(in_child))
        left, lost = list(numbers), Counter[int]()

        def call(number: int) -> Task:
            return careful if lost[number] or self.replaced >= DEATHS else watched

        while left:
            done = self._run(call, left, poll, lost)
            left = [number for number in left if number not in done]

    def _run(
        self,
        call: Callable[[int], Task],
        numbers: Sequence[int],
        poll: Poll | None,
        lost: Counter[int],
    ) -> dict[int, Answer]:
        """Run tasks until all are done or a worker dies; count in ``lost`` what was under way then.

        Any error ends the workers: what they have written is kept.
        """
        waiting, flying = deque(numbers), dict[Future[Answer], int]()
        answers: dict[int, Answer] = {}
        polled = time.monotonic()
        try:
            while waiting or flying:
                while waiting and len(flying) <= self.slots:  # one more than run
                    number = waiting.popleft()
                    flying[self._submit(call(number), number)] = number
                for future in wait(flying, POLL_SECONDS, FIRST_COMPLETED).done:
                    answers[flying[future]] = future.result()
                    del flying[future]
                if poll and time.monotonic() - polled > POLL_SECONDS:
                    poll()
                    polled = time.monotonic()
        except BrokenExecutor as error:
            self._note_death(error, list(flying.values()), lost)
        except BaseException as error:
            self._end()
            if not isinstance(error, Exception) or isinstance(error, PomonaError):
                raise
            log.error("a worker failed", exc_info=error)
            raise JobError(
                f"a worker failed: {first_line(error)}. What is done is kept: run the same command "
                "again to go on; the log file holds the whole story"
            ) from error
        return answers

    def _note_death(self, error: BaseException, flying: list[int], lost: Counter[int]) -> None:
        self._end()
        self.replaced += 1
        log.warning("a worker died and is replaced: %s", first_line(error))
        lost.update(flying)
        if any(lost[number] >= ATTEMPTS for number in flying):
            raise JobError(
                f"workers died {ATTEMPTS} times at the same task: is there enough memory for "
                f"{self.slots} of them? Fewer --workers need less. What is done is kept"
            ) from error

    def _submit(self, task: Task, number: int) -> Future[Answer]:
        if self._pool is None:
            self._pool = self._make_pool()
        future: Future[Answer] = self._pool.submit(task, number)
        return future

    def _make_pool(self) -> Any:
        from loky import ProcessPoolExecutor

        # loky's process that cleans up after a driver that was killed would tell the terminal so.
        before = os.environ.get("PYTHONWARNINGS")
        quiet = "ignore::UserWarning:loky.backend.resource_tracker"
        os.environ["PYTHONWARNINGS"] = f"{before},{quiet}" if before else quiet
        try:
            return ProcessPoolExecutor(
                self.slots,
                initializer=_begin,
                initargs=(os.getpid(), None if self._log_file is None else str(self._log_file)),
                env=ONE_THREAD,
            )
        finally:
            if before is None:
                del os.environ["PYTHONWARNINGS"]
            else:
                os.environ["PYTHONWARNINGS"] = before

    def _end(self) -> None:
        """End the workers at once, whatever they do."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, kill_workers=True)
            self._pool = None


def _watched(spec: BackboneSpec) -> BackboneSpec:
    return spec if spec.guard == "child" else replace(spec, guard="watch")


def _nothing(number: int) -> Answer:
    return {}


def _begin(parent: int, log_file: str | None) -> None:
    """Prepare a worker: imports, one thread, what it prints, and its end. Runs on workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the driver ends workers
    if log_file:
        file = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import onnxruntime  # noqa: F401 - while the driver still lists photos
    import pyarrow as pa

    from pomona.backbone import extract  # noqa: F401

    pa.set_cpu_count(1)


def _end_with(parent: int) -> None:
    """End this process when the driver is gone: a killed driver can't end its workers."""
    while os.name == "nt" or os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)
