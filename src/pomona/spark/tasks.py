"""Spark: the session, tasks on executors, and Hadoop's files. Beside `sparkml`, all of PySpark.

All work on executors goes through ``mapInArrow``, which Spark Connect has too. A task gets a
number, reads its share from storage that driver and executors share, and answers with a few bytes;
photos and features don't pass through the JVM.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from pomona.backbone.spec import BackboneSpec
from pomona.core.cpus import available_cpus
from pomona.core.errors import CrashError, JobError, PomonaError, first_line
from pomona.core.files import atomic_file
from pomona.core.parquet import read_chunk
from pomona.core.schema import ddl
from pomona.spark.resources import slots
from pomona.spark.session import root_cause

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


log = logging.getLogger("pomona")


Poll = Callable[[], None]
POLL_SECONDS = 0.5
END_SECONDS = 5.0
"""How long jobs that were interrupted may take to end."""


# --- tasks -------------------------------------------------------------------------------------

Answer = dict[str, Any]
ANSWERS = pa.schema([("answer", pa.string())])


def run_tasks(
    spark: SparkSession, task: Callable[[int], Answer], count: int, poll: Poll | None = None
) -> list[Answer]:
    """Call ``task(0) … task(count - 1)`` on executors and return the answers in that order.

    Parameters
    ----------
    task
        Picklable, of an installed module: it runs on workers, and may run more than once.
    poll
        Called twice a second on this thread while the job runs.

    Raises
    ------
    JobError
        If Spark gives up on a task.
    """
    if not count:
        return []

    # A range has exactly this many partitions, one number each.
    numbers = spark.range(0, count, 1, count)
    frame = numbers.mapInArrow(functools.partial(_tasks_on_worker, task), ddl(ANSWERS))
    return sorted(collect(frame, poll), key=lambda answer: int(answer["task"]))


def _tasks_on_worker(
    task: Callable[[int], Answer], batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for number in batch["id"].to_pylist():
            yield answer({**task(number), "task": number})


def answer(value: Answer) -> pa.RecordBatch:
    """Return one answer as a batch of `ANSWERS`. Runs on workers."""
    return pa.RecordBatch.from_pylist([{"answer": json.dumps(value)}], ANSWERS)


def collect(frame: DataFrame, poll: Poll | None) -> list[Answer]:
    """Run the job on another thread, so that this one can show progress and take Ctrl-C."""
    rows = _wait([frame.collect], frame.sparkSession, 1, poll)
    return [json.loads(row["answer"]) for row in rows[0]]


def _wait(
    jobs: Sequence[Callable[[], Any]], spark: SparkSession, at_once: int, poll: Poll | None
) -> list[Any]:
    """Run jobs, some of them at once, and return what they return.

    Whatever ends the wait ends the jobs: in a session of the user's nothing would stop them.
    """
    tag = f"pomona-{uuid.uuid4().hex}"

    def tagged(job: Callable[[], Any]) -> Any:
        spark.addTag(tag)
        try:
            return job()
        finally:
            spark.removeTag(tag)

    pool = ThreadPoolExecutor(at_once, thread_name_prefix="pomona")
    futures = [pool.submit(tagged, job) for job in jobs]
    waiting: set[Future[Any]] = set(futures)
    try:
        while waiting:
            done, waiting = wait(waiting, POLL_SECONDS, FIRST_EXCEPTION)
            for future in done:
                future.result()
            if poll:
                poll()
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(Exception):  # the session may be gone, and its jobs with it
            spark.interruptTag(tag)
        wait(futures, END_SECONDS)  # a job that ends now still writes what it brought
        if not isinstance(error, Exception) or isinstance(error, PomonaError):
            raise
        raise _gave_up(error) from error
    pool.shutdown(wait=False)
    return [future.result() for future in futures]


CRASH = "Python worker exited unexpectedly"
"""Spark's words for a worker that is gone: killed, out of memory, or crashed in native code."""


def _gave_up(error: Exception) -> JobError:
    log.error("Spark gave up", exc_info=error)
    kind = CrashError if CRASH in str(error) else JobError
    return kind(
        f"Spark gave up: {root_cause(error)}. What is done is kept: run the same command again to "
        "go on; the log file holds the whole story"
    )


def at_task(spec: BackboneSpec) -> BackboneSpec:
    """Fit a spec to the task that it is used in: which GPU, and how to guard. Runs on workers.

    The first try of a task is watched, and later ones decode in a child process
    (`pomona.photos.isolation`): a photo that ends workers costs itself.
    """
    if "pyspark" not in sys.modules:  # not on Spark, where a task has no second try
        return spec
    from pyspark import TaskContext

    context = TaskContext.get()
    if context is None:
        return spec
    later = context.attemptNumber() > 0 or spec.guard == "child"
    gpus = context.resources().get("gpu")
    number = gpus.addresses[0] if gpus and gpus.addresses else ""
    gpu = int(number) if number.isdecimal() else spec.gpu
    return replace(spec, guard="child" if later else "watch", gpu=gpu)


# --- chunks of a list become files -------------------------------------------------------------


class ChunkTask(Protocol):
    """Turn chunks of a list into files of one folder. Picklable; called on workers.

    Attributes
    ----------
    chunks
        The list, as `pomona.core.parquet.write_chunks` leaves it.
    folder
        Where the files belong.
    """

    @property
    def chunks(self) -> str: ...  # noqa: D102
    @property
    def folder(self) -> str: ...  # noqa: D102
    def write(self, photos: pa.RecordBatch, number: int, folder: str) -> Answer:
        """Write the files of chunk ``number`` into ``folder``."""
        ...

    def done(self) -> set[int]:
        """Return the chunks whose files are in place. Called on the driver."""
        ...

    def careful(self) -> ChunkTask:
        """Return the task as it decodes photos in child processes."""
        ...


@dataclass(frozen=True)
class Shared:
    """Chunks by their place in a list, where workers see the folder. Picklable."""

    task: ChunkTask
    numbers: tuple[int, ...]

    def __call__(self, place: int) -> Answer:
        """Do the chunk at this place."""
        number = self.numbers[place]
        return self.task.write(read_chunk(self.task.chunks, number), number, self.task.folder)


def run_chunks(
    spark: SparkSession,
    task: ChunkTask,
    numbers: Sequence[int],
    *,
    shared: bool,
    poll: Poll | None = None,
) -> None:
    """Do chunks on executors.

    Where they see the driver's folders (``shared``), a task reads its chunk there and leaves its
    files there. Elsewhere the chunk goes out with the task, and the files come back through Spark:
    many small jobs, a few at once, so that what is done is on the driver's disk soon.
    """
    if shared:
        run_tasks(spark, Shared(task, tuple(numbers)), len(numbers), poll)
        return
    width, at_once = waves(len(numbers), slots(spark))
    jobs = [
        functools.partial(_wave, spark, task, tuple(numbers[start : start + width]))
        for start in range(0, len(numbers), width)
    ]
    _wait(jobs, spark, at_once, poll)


IN_FLIGHT = 32
"""Tasks that are on their way at least: a cluster that grows on demand must see the demand."""


def waves(chunks: int, slots: int) -> tuple[int, int]:
    """Return how many tasks a job has, and how many jobs run at once.

    No slot waits, a short run has eight jobs or so (what is done comes back with its job), and a
    long one few: the weights go out with each.

    >>> waves(16, 2), waves(2000, 2), waves(2000, 64), waves(50_000, 1000)
    ((2, 16), (16, 2), (32, 4), (32, 16))
    """
    width = max(1, min(32, max(slots, min(16, -(-chunks // 8)))))
    return width, max(2, min(16, -(-max(2 * slots, IN_FLIGHT) // width)))


FILES = pa.schema([("name", pa.string()), ("content", pa.binary())])


def _wave(spark: SparkSession, task: ChunkTask, numbers: tuple[int, ...]) -> None:
    chunks = [_to_bytes(read_chunk(task.chunks, number)) for number in numbers]
    on_worker = functools.partial(_chunks_on_worker, task, numbers, chunks)
    frame = spark.range(0, len(numbers), 1, len(numbers)).mapInArrow(on_worker, ddl(FILES))
    for batch in frame.toArrow().to_batches():
        for name, content in zip(batch["name"].to_pylist(), batch["content"], strict=True):
            with atomic_file(Path(task.folder, name)) as part:
                part.write_bytes(content.as_buffer())


def _to_bytes(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def _chunks_on_worker(
    task: ChunkTask,
    numbers: tuple[int, ...],
    chunks: list[bytes],
    batches: Iterator[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for place in batch["id"].to_pylist():
            photos = pa.ipc.open_stream(chunks[place]).read_next_batch()
            with tempfile.TemporaryDirectory(prefix="pomona-") as folder:
                task.write(photos, numbers[place], folder)
                for path in sorted(Path(folder).iterdir()):
                    row = {"name": path.name, "content": path.read_bytes()}
                    yield pa.RecordBatch.from_pylist([row], FILES)


def run_here(task: Callable[[int], Answer], count: int, poll: Poll | None = None) -> list[Answer]:
    """Call ``task(0) … task(count - 1)`` on the driver: for what only the driver sees."""
    with ThreadPoolExecutor(available_cpus()) as pool:
        answers = []
        for found in pool.map(task, range(count)):
            answers.append(found)
            if poll:
                poll()
    return answers


def run_torch(
    spark: SparkSession,
    processes: int,
    on_gpu: bool,
    function: Callable[[str], None],
    argument: str,
    poll: Poll,
    log_file: Path | None = None,
) -> None:
    """Run a function in processes that train together, started by Spark's TorchDistributor.

    With a local master they are children of the driver; on a cluster, tasks of one barrier stage,
    which see the folder that the argument names on storage that driver and executors share. What
    they print goes to the log file.

    Raises
    ------
    JobError
        If one of them failed.
    """
    from pyspark.ml.torch.distributor import TorchDistributor

    here = spark.sparkContext.master.startswith("local")
    try:
        distributor = TorchDistributor(processes, local_mode=here, use_gpu=on_gpu)
    except (ValueError, RuntimeError) as error:
        raise JobError(
            f"Spark can't start {processes} processes: {first_line(error)}: give Spark its "
            "GPUs (docs/cluster.md), take fewer --processes, or --device cpu"
        ) from error
    with (
        (log_file or Path(os.devnull)).open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
    ):
        _wait([lambda: distributor.run(function, argument)], spark, 1, poll)


def partition() -> int:
    """Return the number of the partition that this worker is at."""
    from pyspark import TaskContext

    context = TaskContext.get()
    return int(context.partitionId()) if context else 0
