"""Tasks on Spark's executors, chunks of a list that become files, processes that train together.

All work on executors goes through ``mapInArrow``, which Spark Connect has too. A task gets a
number, reads its input from storage that driver and executors share, and returns a few bytes.
Photos and features don't pass through the JVM, except where executors don't see the folder.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pomona.backbone.spec import BackboneSpec
from pomona.core.cpus import available_cpus
from pomona.core.errors import CrashError, JobError, PomonaError, first_line
from pomona.core.files import atomic_file
from pomona.core.parquet import read_chunk
from pomona.core.schema import ddl
from pomona.engine.engine import POLL_SECONDS, Answer, ChunkTask, InPlace, Poll, Task
from pomona.spark.resources import slots
from pomona.spark.session import root_cause

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger("pomona")

ANSWERS = pa.schema([("answer", pa.string())])

END_SECONDS = 5.0
"""How long interrupted jobs may take to end."""


# --- tasks -------------------------------------------------------------------------------------


def run_tasks(
    spark: SparkSession, task: Task, count: int, poll: Poll | None = None
) -> list[Answer]:
    """Call ``task(0) … task(count - 1)`` on executors and return the answers in that order.

    The task is picklable, of an installed module, and may run more than once for a number. ``poll``
    is called twice a second on this thread. Raises JobError if Spark gives up on a task.
    """
    if not count:
        return []
    numbers = spark.range(0, count, 1, count)  # `count` partitions with one number each
    answers = numbers.mapInArrow(functools.partial(_run_on_worker, task), ddl(ANSWERS))
    return sorted(collect(answers, poll), key=lambda answer: int(answer["task"]))


def _run_on_worker(task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Run a task for each number. Runs on workers."""
    for batch in batches:
        for number in batch["id"].to_pylist():
            yield answer({**task(number), "task": number})


def answer(value: Answer) -> pa.RecordBatch:
    """Return one answer as a batch of `ANSWERS`. Runs on workers."""
    return pa.RecordBatch.from_pylist([{"answer": json.dumps(value)}], ANSWERS)


def collect(answers: DataFrame, poll: Poll | None) -> list[Answer]:
    """Run the job that computes a frame of `ANSWERS`, and return them in any order."""
    (rows,) = _run_jobs([answers.collect], answers.sparkSession, 1, poll)
    return [json.loads(row["answer"]) for row in rows]


def run_here(task: Task, count: int, poll: Poll | None = None) -> list[Answer]:
    """Call ``task(0) … task(count - 1)`` in threads of the driver, for files only it sees."""
    answers = []
    with ThreadPoolExecutor(available_cpus()) as pool:
        for result in pool.map(task, range(count)):
            answers.append(result)
            if poll:
                poll()
    return answers


def _run_jobs(
    jobs: Sequence[Callable[[], Any]], spark: SparkSession, at_once: int, poll: Poll | None
) -> list[Any]:
    """Run Spark jobs in threads, so that this thread can show progress and take Ctrl-C.

    Any error cancels the jobs, by a tag: in a session of the user's nothing else would.
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
    pending: set[Future[Any]] = set(futures)
    try:
        while pending:
            done, pending = wait(pending, POLL_SECONDS, FIRST_EXCEPTION)
            for future in done:
                future.result()
            if poll:
                poll()
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(Exception):  # the session may be gone, and its jobs with it
            spark.interruptTag(tag)
        wait(futures, END_SECONDS)  # a job that ends now still writes its results
        if not isinstance(error, Exception) or isinstance(error, PomonaError):
            raise
        raise _job_error(error) from error
    pool.shutdown(wait=False)
    return [future.result() for future in futures]


WORKER_DIED = "Python worker exited unexpectedly"
"""Spark's message for a worker that was killed, ran out of memory or crashed in native code."""


def _job_error(error: Exception) -> JobError:
    log.error("Spark gave up", exc_info=error)
    kind = CrashError if WORKER_DIED in str(error) else JobError
    return kind(
        f"Spark gave up: {root_cause(error)}. What is done is kept: run the same command again to "
        "go on; the log file holds the whole story"
    )


def at_task(spec: BackboneSpec) -> BackboneSpec:
    """Return the spec with the GPU and the guard of the current task. Runs on workers.

    The first attempt of a task is watched, later ones decode in a child process
    (`pomona.photos.isolation`): a photo that kills workers then costs only itself.
    """
    from pyspark import TaskContext

    context = TaskContext.get()
    if context is None:
        return spec
    is_retry = context.attemptNumber() > 0 or spec.guard == "child"
    gpus = context.resources().get("gpu")
    address = gpus.addresses[0] if gpus and gpus.addresses else ""
    gpu = int(address) if address.isdecimal() else spec.gpu
    return replace(spec, guard="child" if is_retry else "watch", gpu=gpu)


def partition() -> int:
    """Return the number of the partition that is being computed. Runs on workers."""
    from pyspark import TaskContext

    context = TaskContext.get()
    return int(context.partitionId()) if context else 0


# --- chunks of a list become files -------------------------------------------------------------


@dataclass(frozen=True)
class SharedChunks:
    """Run some of a task's chunks in place. Picklable; runs on workers."""

    task: ChunkTask
    numbers: tuple[int, ...]

    def __call__(self, index: int) -> Answer:
        """Write the files of the chunk ``numbers[index]`` in place."""
        return InPlace(self.task.with_spec(at_task))(self.numbers[index])


def send_chunks(
    spark: SparkSession, task: ChunkTask, numbers: Sequence[int], poll: Poll | None = None
) -> None:
    """Run chunks on executors that don't see the driver's folders.

    A chunk travels with its task, and its files come back through Spark to the driver's disk as
    soon as their job ends. There are many small jobs, several at once. Raises JobError if Spark
    gives up on a task.
    """
    width, at_once = job_sizes(len(numbers), slots(spark))
    jobs = [
        functools.partial(_send_job, spark, task, tuple(numbers[start : start + width]))
        for start in range(0, len(numbers), width)
    ]
    _run_jobs(jobs, spark, at_once, poll)


IN_FLIGHT = 32
"""Least number of tasks in Spark's queue: a cluster that grows on demand must see the demand."""


def job_sizes(chunks: int, slots: int) -> tuple[int, int]:
    """Return how many tasks (chunks) a job has, and how many jobs run at once.

    Results return when a job ends, and each job resends the weights: short runs use about 8 jobs,
    long runs up to 32 tasks a job.

    >>> job_sizes(16, 2), job_sizes(2000, 2), job_sizes(2000, 64), job_sizes(50_000, 1000)
    ((2, 16), (16, 2), (32, 4), (32, 16))
    """
    width = max(1, min(32, max(slots, min(16, -(-chunks // 8)))))
    return width, max(2, min(16, -(-max(2 * slots, IN_FLIGHT) // width)))


FILES = pa.schema([("name", pa.string()), ("content", pa.binary())])


def _send_job(spark: SparkSession, task: ChunkTask, numbers: tuple[int, ...]) -> None:
    chunks = [_to_bytes(read_chunk(task.chunks, number)) for number in numbers]
    on_worker = functools.partial(_files_on_worker, task, numbers, chunks)
    files = spark.range(0, len(numbers), 1, len(numbers)).mapInArrow(on_worker, ddl(FILES))
    for batch in files.toArrow().to_batches():
        for name, content in zip(batch["name"].to_pylist(), batch["content"], strict=True):
            with atomic_file(Path(task.folder, name)) as part:
                part.write_bytes(content.as_buffer())


def _to_bytes(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def _files_on_worker(
    task: ChunkTask,
    numbers: tuple[int, ...],
    chunks: list[bytes],
    batches: Iterator[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    """Run chunks and return their files as rows of `FILES`. Runs on workers."""
    for batch in batches:
        for index in batch["id"].to_pylist():
            photos = pa.ipc.open_stream(chunks[index]).read_next_batch()
            with tempfile.TemporaryDirectory(prefix="pomona-") as folder:
                task.with_spec(at_task).write(photos, numbers[index], folder)
                for path in sorted(Path(folder).iterdir()):
                    row = {"name": path.name, "content": path.read_bytes()}
                    yield pa.RecordBatch.from_pylist([row], FILES)


# --- processes that train together -------------------------------------------------------------


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
    which must see the folder that the argument names. What they print goes to the log file. Raises
    JobError if one of them failed.
    """
    from pyspark.ml.torch.distributor import TorchDistributor

    is_local = spark.sparkContext.master.startswith("local")
    try:
        distributor = TorchDistributor(processes, local_mode=is_local, use_gpu=on_gpu)
    except (ValueError, RuntimeError) as error:
        raise JobError(
            f"Spark can't start {processes} processes: {first_line(error)}: give Spark its "
            "GPUs (docs/cluster.md), take fewer --processes, or --device cpu"
        ) from error
    with (
        (log_file or Path(os.devnull)).open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
    ):
        _run_jobs([lambda: distributor.run(function, argument)], spark, 1, poll)
