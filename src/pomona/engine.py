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
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pomona import connect, sources
from pomona.backbone import BackboneSpec, extract
from pomona.errors import JobError, MissingError
from pomona.rows import read_chunk
from pomona.schema import ddl
from pomona.sources import Source
from pomona.tables import PartFile, write_part

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


@contextlib.contextmanager
def session(cluster: Cluster) -> Iterator[SparkSession]:
    """Give the active Spark session, left running afterwards, or one of our own, stopped then."""
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is not None:
        yield active
        return
    if connect.is_server(cluster.master):
        connect.check_server(cluster.master)
        builder = SparkSession.builder.remote(cluster.master)
    else:
        check_java()
        # Without this, workers are whatever `python3` comes first on the PATH.
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


def slots(spark: SparkSession) -> int:
    """Return how many tasks run at once."""
    cpus = _task_cpus(spark)
    local = re.fullmatch(r"local\[(\d+|\*)(?:,\s*\d+)?\]", spark.conf.get("spark.master", "") or "")
    if local:
        threads = (os.cpu_count() or 1) if local[1] == "*" else int(local[1])
        return max(1, threads // cpus)
    with contextlib.suppress(Exception):  # Spark Connect has no SparkContext
        return max(1, int(spark.sparkContext.defaultParallelism) // cpus)
    return 2


def fit_spec(spec: BackboneSpec, spark: SparkSession) -> BackboneSpec:
    """Fit threads and GPU memory to a task slot.

    On a CPU a worker has as many threads as its slot has CPUs, so that none are too many. On a GPU
    each worker decodes with its share of the machine's cores.
    """
    cpus = _task_cpus(spark)
    if spec.device == "cpu":
        return replace(spec, threads=cpus)
    local = (spark.conf.get("spark.master", "") or "").startswith("local")
    workers = slots(spark)
    cores = os.cpu_count() or 1
    if not local:
        # On a cluster what counts is what one executor has; the driver's cores say nothing.
        cores = int(spark.conf.get("spark.executor.cores", str(cpus)) or cpus)
        workers = max(1, cores // cpus)
    return replace(spec, threads=max(2, cores // workers), memory_share=0.9 / workers)


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
    result: list[Answer] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.extend(json.loads(row["answer"]) for row in frame.collect())
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        if poll:
            poll()
    if failure:
        log.error("Spark gave up", exc_info=failure[0])
        raise JobError(
            f"Spark gave up: {root_cause(failure[0])}. What is done is kept: run the same command "
            "again to go on; the log file holds the whole story"
        ) from failure[0]
    return result


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
    lines = python or causes or text.splitlines() or [type(error).__name__]
    return lines[-1 if python else 0].strip()[:300]


# --- photos ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExtractTask:
    """Extract one chunk of a list of photos into a part. Picklable; called on workers."""

    chunks: str
    source: Source
    spec: BackboneSpec
    part: PartFile

    def __call__(self, number: int) -> Answer:
        """Do chunk ``number``."""
        photos = read_chunk(self.chunks, number)
        size = self.spec.batch_size
        batches = (photos.slice(start, size) for start in range(0, photos.num_rows, size))
        rows = extract(sources.read(batches, self.source), self.spec)
        return write_part(self.part, number, rows)._asdict()
