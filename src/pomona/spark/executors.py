"""What a cluster's executors have and see: Pomona's code, the source, the folder OUT.

On one machine they have and see what the driver does, and nothing is checked. To a cluster the code
is sent, and one small job checks the rest before the long one starts.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.util
import logging
import shutil
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pomona.core.errors import CrashError, JobError, RequestError, SourceError, first_line
from pomona.engine.engine import Answer, ChunkTask, Poll, Task, in_child
from pomona.photos.reading import reader
from pomona.photos.source import Source
from pomona.spark import tasks
from pomona.spark.resources import slots
from pomona.spark.session import root_cause
from pomona.spark.tasks import SharedChunks

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger("pomona")

MODULES = ("numpy", "PIL", "pyarrow", "safetensors")
"""Modules that a worker imports, beside the backend's."""
BACKENDS = {"onnx": "onnxruntime", "torch": "torch"}


def on_this_machine(spark: SparkSession) -> bool:
    """Tell whether the session's workers are processes of this machine, started by its JVM."""
    is_connect = type(spark).__module__.startswith("pyspark.sql.connect")
    return not is_connect and (spark.conf.get("spark.master", "") or "").startswith("local")


@functools.lru_cache(maxsize=1)
def ship(spark: SparkSession) -> None:
    """Send the driver's Pomona to executors, where it comes before any that is installed."""
    package = Path(__file__).parents[1]
    if on_this_machine(spark) or not package.is_dir():  # imported from an archive: already sent
        return
    folder = Path(tempfile.mkdtemp(prefix="pomona-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    spark.addArtifacts(str(pack(package, folder)), pyfile=True)


def pack(package: Path, folder: Path) -> Path:
    """Write a package's modules into an archive whose name holds their digest."""
    files = sorted(package.rglob("*.py"))
    sha = hashlib.sha256()
    for file in files:
        sha.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    archive = folder / f"{package.name}-{sha.hexdigest()[:12]}.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in files:
            packed.write(file, file.relative_to(package.parent).as_posix())
    return archive


@dataclass(frozen=True)
class Probe:
    """A task that tells what a worker has and sees. Picklable; runs on workers."""

    token: str = ""  # a file that the driver has just written
    modules: tuple[str, ...] = ()
    source: Source | None = None
    path: str = ""  # of a photo that the driver can read

    def __call__(self, number: int) -> Answer:
        """Return ``sees`` (the token), ``missing`` (modules), ``trouble`` (reading the photo)."""
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        trouble = _read_error(self.source, self.path) if self.source and not missing else ""
        return {"sees": Path(self.token).is_file(), "missing": missing, "trouble": trouble}


def _read_error(source: Source, path: str) -> str:
    try:
        reader(source)(path)
    except (OSError, SourceError) as error:
        return first_line(error)
    return ""


def _run_probe(spark: SparkSession, probe: Probe) -> list[Answer]:
    ship(spark)
    try:
        return tasks.run_tasks(spark, probe, slots(spark))
    except JobError as error:
        raise RequestError(
            f"the executors can't run Pomona: {root_cause(error.__cause__ or error)}; they "
            "need the same Python version as the driver and Pomona's dependencies "
            "(PYSPARK_PYTHON names their Python)"
        ) from error


def check(spark: SparkSession, backend: str, source: Source, paths: list[str]) -> None:
    """Check that executors have what a run needs and can read the source.

    Of ``paths``, they try the first that the driver itself can read. Raises RequestError if they
    lack a module or can't run Pomona's code, SourceError if they can't read what the driver can.
    """
    if on_this_machine(spark):
        return
    probe = Probe(modules=(*MODULES, BACKENDS[backend]))
    if source.kind != "hadoop":  # what only Hadoop reads, Spark reads itself
        path = next((path for path in paths if not _read_error(source, path)), None)
        if path is not None:
            probe = Probe("", probe.modules, source, path)
    for answer in _run_probe(spark, probe):
        if answer["missing"]:
            raise RequestError(
                f"the executors' Python has no {', '.join(answer['missing'])}: install Pomona's "
                "dependencies there, or name their Python in PYSPARK_PYTHON"
            )
        if answer["trouble"]:
            raise SourceError(
                f"the executors can't read {source.name} ({answer['trouble']}): a source is a "
                "folder that driver and executors both see, or a URI that both may read"
            )


_is_shared: dict[tuple[int, Path], bool] = {}
"""Whether executors see a folder, by session and folder."""


def share(spark: SparkSession, folder: Path) -> bool:
    """Tell whether executors see a folder of the driver's.

    The probe may run only on executors of the driver's own host; `run_chunks` and `runner` notice
    later if others don't see it.
    """
    if on_this_machine(spark):
        return True
    key = (id(spark), folder)
    if key not in _is_shared:
        token = folder / f".look-{uuid.uuid4().hex}"
        token.touch()
        try:
            answers = _run_probe(spark, Probe(str(token)))
            _is_shared[key] = all(answer["sees"] for answer in answers)
        finally:
            token.unlink()
        if not _is_shared[key]:
            log.warning("executors don't see %s: what they make comes back through Spark", folder)
    return _is_shared[key]


def _was_unseen(spark: SparkSession, folder: Path, error: JobError) -> bool:
    """Tell whether a job failed because an executor doesn't see the folder, and remember it."""
    message = str(error.__cause__ or error)
    if not share(spark, folder) or not ("No such file" in message and str(folder) in message):
        return False
    log.warning("some executors don't see %s: what they make comes back through Spark", folder)
    _is_shared[id(spark), folder] = False
    return True


def run_chunks(
    spark: SparkSession,
    task: ChunkTask,
    numbers: Sequence[int],
    folder: Path,
    poll: Poll | None = None,
) -> None:
    """Run chunks on executors, whether they see the folder or not.

    Where workers died and a task had one attempt (a local session of the user's), the remaining
    chunks run once more, with photos decoded in child processes. Raises JobError if Spark gave up.
    """
    is_retry = False
    while True:
        try:
            if share(spark, folder):
                tasks.run_tasks(spark, SharedChunks(task, tuple(numbers)), len(numbers), poll)
            else:
                tasks.send_chunks(spark, task, numbers, poll)
            return
        except CrashError:
            if is_retry:
                raise
            log.warning("workers died: what is left is decoded in child processes")
            task, is_retry = task.with_spec(in_child), True
        except JobError as error:
            if not _was_unseen(spark, folder, error):
                raise
        done = task.done()
        numbers = [number for number in numbers if number not in done]


def runner(spark: SparkSession, folder: Path) -> Callable[..., list[Answer]]:
    """Return ``run_tasks(task, count, poll)`` for tasks that read and write in a folder.

    They run on the executors if those see the folder, and otherwise on the driver: such tasks take
    0.2 ms for a photo, against 5 to 10 ms in `extract`.
    """

    def run_tasks(task: Task, count: int, poll: Poll | None = None) -> list[Answer]:
        if share(spark, folder):
            try:
                return tasks.run_tasks(spark, task, count, poll)
            except JobError as error:
                if not _was_unseen(spark, folder, error):
                    raise
        return tasks.run_here(task, count, poll)

    return run_tasks
