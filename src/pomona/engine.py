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
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from pomona import connect, manifest, sources
from pomona.backbone import BackboneSpec, extract
from pomona.errors import CrashError, JobError, MissingError, PomonaError
from pomona.rows import read_chunk
from pomona.schema import ddl
from pomona.sources import Source
from pomona.tables import PartFile, task_of, write_part

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger("pomona")

JAVA_NEEDED = 17
JAVA_REMEDY = (
    "Debian/Ubuntu: sudo apt-get install openjdk-17-jre-headless; macOS: brew install openjdk@17; "
    "Windows: winget install EclipseAdoptium.Temurin.17.JRE"
)

TRIES = 4
"""Of a task, as on a cluster (spark.task.maxFailures)."""

Poll = Callable[[], None]
POLL_SECONDS = 0.5
END_SECONDS = 5.0
"""How long jobs that were interrupted may take to end."""


# --- the session -------------------------------------------------------------------------------


def check_java() -> None:
    """Raise MissingError, with the command that installs it, if Java 17 or newer isn't there."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin") if home else shutil.which("java")
    told = ""
    if java:
        with contextlib.suppress(OSError):
            told = subprocess.run(
                [java, "-version"], capture_output=True, text=True, check=False
            ).stderr
    found = re.search(r'version "(?:1\.)?(\d+)', told)
    if not found or int(found[1]) < JAVA_NEEDED:
        what = f"Java {found[1]} was found" if found else "no Java was found"
        raise MissingError(f"Spark needs Java {JAVA_NEEDED} or newer, and {what}. {JAVA_REMEDY}")


@dataclass(frozen=True)
class Cluster:
    """Where Spark runs.

    Attributes
    ----------
    master
        As Spark writes it, or ``sc://HOST:PORT`` of a Spark Connect server; used only when no
        session is active.
    conf
        Further settings of Spark.
    log_file
        Takes what the JVM and the workers print.
    """

    master: str = "local[*]"
    conf: tuple[tuple[str, str], ...] = ()
    log_file: Path | None = None


def active_session() -> SparkSession | None:
    """Return the user's session, also where another thread made it: to the JVM it isn't active."""
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is not None:
        return active
    made = getattr(SparkSession, "_instantiatedSession", None)
    return made if made is not None and made.sparkContext._jsc is not None else None


@contextlib.contextmanager
def session(cluster: Cluster) -> Iterator[SparkSession]:
    """Give the active Spark session, left running afterwards, or one of our own, stopped then."""
    from pyspark.sql import SparkSession

    active = active_session()
    if active is not None:
        yield active
        return
    if connect.is_server(cluster.master):
        connect.check_server(cluster.master)
        builder = SparkSession.builder.remote(cluster.master)
    else:
        check_java()
        if cluster.master.startswith("local"):
            # Without this, workers are whatever `python3` comes first on the PATH. On other
            # machines that is right: the driver's own path means nothing there.
            os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        # Local mode gives a task one try; a worker that dies shouldn't end a long run there either.
        master = re.sub(r"^local\[([^,\]]+)\]$", rf"local[\1,{TRIES}]", cluster.master)
        builder = SparkSession.builder.master(master)
    builder = builder.appName("pomona")
    for key, value in {**_defaults(cluster.master), **dict(cluster.conf)}.items():
        builder = builder.config(key, value)
    try:
        with _noise_to(cluster.log_file):
            spark = builder.getOrCreate()
    except Exception as error:
        log.exception("Spark did not start")
        where = f" ({cluster.log_file})" if cluster.log_file else ""
        master = connect.shown(cluster.master)
        raise JobError(
            f"Spark did not start on {master}: {root_cause(error)}; see the log{where}"
        ) from error
    try:
        yield spark
    finally:
        with contextlib.suppress(Exception):  # the JVM may be gone already, and that is the wish
            spark.stop()
        with contextlib.suppress(Exception):
            _stop_gateway()


def adopt() -> None:
    """Make the session that spark-submit or a platform set up the active one, with its settings.

    `session` then takes it, whatever master the command line names.
    """
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    SparkSession.builder.appName("pomona").getOrCreate()


@contextlib.contextmanager
def lazy_session(cluster: Cluster) -> Iterator[Callable[[], SparkSession]]:
    """Give a function that starts the session when it is first called: a run may need none."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda: stack.enter_context(session(cluster)))


def _defaults(master: str) -> dict[str, str]:
    if connect.is_server(master):
        return {}  # the server has its own
    conf = {"spark.log.level": "WARN", "spark.ui.showConsoleProgress": "false"}
    if master.startswith("local"):
        # One machine: no name look-ups, no web server, and one thread in each worker's libraries.
        conf |= {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.ui.enabled": "false",
            "spark.executorEnv.OMP_NUM_THREADS": "1",
        }
    return conf


@contextlib.contextmanager
def _noise_to(log_file: Path | None) -> Iterator[None]:
    """Let the JVM, which is started in here, inherit the log file in place of our output."""
    if log_file is None:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with log_file.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def _stop_gateway() -> None:
    """End the JVM too: the next session, with other settings, must start its own."""
    from pyspark import SparkContext

    gateway = SparkContext._gateway
    if gateway is None:
        return
    gateway.shutdown()
    process = getattr(gateway, "proc", None)
    if process is not None:
        process.stdin.close()
        process.wait(timeout=10)
    SparkContext._gateway = None
    SparkContext._jvm = None


def _task_cpus(spark: SparkSession) -> int:
    return int(spark.conf.get("spark.task.cpus", "1") or 1)


SLOTS_UNKNOWN = 16
"""Of a server's cluster that doesn't tell its size, and executors of one that grows on demand: too
many tasks only wait in Spark's queue."""


def slots(spark: SparkSession) -> int:
    """Return how many tasks run at once."""
    cpus = _task_cpus(spark)
    local = re.fullmatch(r"local\[(\d+|\*)(?:,\s*\d+)?\]", spark.conf.get("spark.master", "") or "")
    if local:
        threads = (os.cpu_count() or 1) if local[1] == "*" else int(local[1])
        return max(1, threads // cpus)
    if (spark.conf.get("spark.dynamicAllocation.enabled", "") or "") == "true":
        most = int(spark.conf.get("spark.dynamicAllocation.maxExecutors", "") or SLOTS_UNKNOWN)
        cores = int(spark.conf.get("spark.executor.cores", "1") or 1)
        return max(1, min(most, SLOTS_UNKNOWN) * cores // cpus)
    with contextlib.suppress(Exception):  # Spark Connect has no SparkContext
        return max(1, int(spark.sparkContext.defaultParallelism) // cpus)
    executors = int(spark.conf.get("spark.executor.instances", "0") or 0)
    cores = int(spark.conf.get("spark.executor.cores", "1") or 1)
    return max(1, executors * cores // cpus) if executors else SLOTS_UNKNOWN


def fit_spec(spec: BackboneSpec, spark: SparkSession) -> BackboneSpec:
    """Fit threads and GPU memory to a task slot.

    On a CPU a worker has as many threads as its slot has CPUs, so that none are too many. On a GPU
    each worker decodes with its share of the machine's cores.
    """
    cpus = _task_cpus(spark)
    if spec.device == "cpu":
        return replace(spec, threads=cpus)
    if amount := float(spark.conf.get(GPU_AMOUNT, "0") or 0):
        # Spark hands out the GPUs: so many tasks share one.
        return replace(spec, threads=max(2, cpus), memory_share=0.9 * min(1.0, amount))
    local = (spark.conf.get("spark.master", "") or "").startswith("local")
    workers = slots(spark)
    cores = os.cpu_count() or 1
    if not local:
        # On a cluster what counts is what one executor has; the driver's cores say nothing.
        cores = int(spark.conf.get("spark.executor.cores", str(cpus)) or cpus)
        workers = max(1, cores // cpus)
    return replace(spec, threads=max(2, cores // workers), memory_share=0.9 / workers)


GPU_AMOUNT = "spark.task.resource.gpu.amount"
"""Spark's setting for the GPUs of a task: a number, or the share of one."""


def gives_gpus(cluster: Cluster | None = None) -> bool:
    """Tell whether Spark gives GPUs to tasks, by its settings: the driver needn't have one."""
    active = active_session()
    if active is not None:
        return float(active.conf.get(GPU_AMOUNT, "0") or 0) > 0
    return cluster is not None and float(dict(cluster.conf).get(GPU_AMOUNT, "0") or 0) > 0


def gpus_elsewhere(cluster: Cluster, device: str) -> bool:
    """Tell whether the workers have the GPUs, so that what this machine has says nothing.

    Of a cluster that doesn't tell (a Spark Connect server before there is a session), ``cuda`` is
    taken for an answer.
    """
    here = cluster.master.startswith("local")
    return device != "cpu" and (gives_gpus(cluster) or (device == "cuda" and not here))


GPU_WORKERS = 2
"""Workers for one GPU in local mode: one computes while the other decodes. Each has a CUDA context,
so there isn't one for each core."""


def local_master(master: str, device: str) -> str:
    """Return the master with as many slots as a GPU serves, not all cores."""
    if device != "cpu" and master == "local[*]":
        return f"local[{min(GPU_WORKERS, os.cpu_count() or 1)}]"
    return master


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

    The first try of a task is watched, and later ones decode in a child process (`pomona.guard`):
    a photo that ends workers costs itself.
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
        The list, as `pomona.rows.write_chunks` leaves it.
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
            with manifest.aside(Path(task.folder, name)) as part:
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
    with ThreadPoolExecutor(os.cpu_count()) as pool:
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
            f"Spark can't start {processes} processes: {sources.first_line(error)}: give Spark its "
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


def modified_in_hadoop(spark: SparkSession, uri: str) -> int:
    """Return a file's time in milliseconds; 0 over Spark Connect, where Hadoop is out of reach."""
    try:
        path = spark.sparkContext._jvm.org.apache.hadoop.fs.Path(uri)
        conf = spark.sparkContext._jsc.hadoopConfiguration()
        return int(path.getFileSystem(conf).getFileStatus(path).getModificationTime())
    except Exception as error:  # noqa: BLE001 - no JVM over Connect; or the file has gone since
        log.warning("no time for %s: %s", uri, sources.first_line(error))
        return 0


def root_cause(error: BaseException) -> str:
    """Return the one line of a Spark failure that says why."""
    text = str(error)
    python = [
        line
        for line in text.splitlines()
        if re.match(r"(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b", line.strip())
    ]
    causes = [line for line in text.splitlines() if line.startswith("Caused by:")]
    java = [line[2:] for line in text.splitlines() if line.startswith(": ")]  # Py4J's second line
    lines = python or causes or java or text.splitlines() or [type(error).__name__]
    return lines[-1 if python else 0].strip()[:300]


# --- photos ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExtractTask:
    """Extract chunks of a list of photos into parts. A `ChunkTask`."""

    chunks: str
    source: Source
    spec: BackboneSpec
    part: PartFile

    @property
    def folder(self) -> str:
        """Where the parts belong."""
        return self.part.folder

    def write(self, photos: pa.RecordBatch, number: int, folder: str) -> Answer:
        """Write the part of chunk ``number``."""
        spec = at_task(self.spec)
        size = spec.batch_size
        batches = (photos.slice(start, size) for start in range(0, photos.num_rows, size))
        rows = extract(sources.read(batches, self.source), spec)
        return write_part(self.part._replace(folder=folder), number, rows)._asdict()

    def done(self) -> set[int]:
        """Return the chunks whose parts are in place."""
        return {task_of(path.name) for path in Path(self.folder).glob(f"{self.part.run}-*")}

    def careful(self) -> ExtractTask:
        """Return the task as it decodes photos in child processes."""
        return replace(self, spec=replace(self.spec, guard="child"))
