"""The stage ``predict``: photos, folders, URIs or standard input become answers."""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pomona.core.cpus import available_cpus
from pomona.core.errors import MismatchError, RequestError, SourceError
from pomona.core.files import FORMAT, atomic_file, read_json, write_json
from pomona.core.parquet import even_bounds, read_chunk, write_chunks
from pomona.core.progress import OnTick, Tick, quiet
from pomona.core.uris import local_path
from pomona.model.artifact import Model
from pomona.model.recogniser import ANSWERS, Recogniser, make_recogniser, recognise, with_threads
from pomona.photos.listing import list_files
from pomona.photos.reading import read, with_content
from pomona.photos.source import MAX_BYTES, SUFFIXES, Source, is_photo, open_source

STDIN = "-"
SPARK_ABOVE = 2000
"""Photos: below, Spark's start costs more than it gains."""
PER_TASK = 256
WORTH_TELLING = 100
"""Photos: fewer are answered before a progress bar is read."""
ROWS = pa.schema([("path", pa.string()), *ANSWERS])
"""An answer of `predict`; ``path`` is the argument, with the rest of the way for a folder."""

TODO = pa.schema([("path", pa.string()), ("shown", pa.string())])


@dataclass(frozen=True)
class PredictOptions:
    """How photos become answers; see ``pomona predict --help``."""

    top: int = 3
    device: str = "auto"
    out: str | None = None
    most: int | None = None  # photos, where the answers don't go into files
    master: str | None = None
    spark_conf: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Wanted:
    """The photos of one argument.

    Attributes
    ----------
    source
        Where they lie; None: standard input.
    photos
        As `TODO`: the path in the source, and as it is shown.
    """

    source: Source | None
    photos: pa.Table


def find(arguments: list[str], on_tick: OnTick = quiet) -> list[Wanted]:
    """Find the photos of the arguments.

    Raises
    ------
    SourceError
        If one doesn't exist, or a folder holds no photos.
    """
    if not arguments:
        raise RequestError("predict takes photos, folders, URIs, or - for standard input")
    if arguments.count(STDIN) > 1:
        raise RequestError("standard input can be read once: give - once")
    return [_find(argument, on_tick) for argument in arguments]


def _find(argument: str, on_tick: OnTick) -> Wanted:
    if argument == STDIN:
        return Wanted(None, pa.table([[STDIN], [STDIN]], schema=TODO))
    path = local_path(argument)
    if "://" not in argument or argument.startswith("file://"):
        if path.is_file():
            return _one(open_source(path.parent), path.name, argument)
        if not path.exists():
            raise SourceError(f"there is no {argument}: give a photo, a folder or a URI")
    source = open_source(argument)
    if source.kind == "object" and is_photo(source.root):
        folder, _, name = source.root.rpartition("/")
        return _one(replace(source, root=folder), name, source.name)
    if source.kind == "hadoop":
        raise SourceError(
            f"{argument}: predict reads local folders, s3:// and gs://; for other URIs make "
            "features with pomona extract first"
        )
    told = lambda n: on_tick(Tick("list", n)) if n > WORTH_TELLING else None  # noqa: E731
    files = list_files(source, told).files
    if not files.num_rows:
        raise SourceError(f"{argument} holds no photos: they end in {' '.join(SUFFIXES)}")
    paths = files.sort_by("path")["path"]
    start = source.name if source.kind == "object" else argument.rstrip("/")
    shown = pa.array([f"{start}/{path}" for path in paths.to_pylist()], pa.string())
    return Wanted(source, pa.table([paths, shown], schema=TODO))


def _one(source: Source, name: str, shown: str) -> Wanted:
    return Wanted(source, pa.table([[name], [shown]], schema=TODO))


# --- answering ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PredictTask:
    """Answer chunks of photos into Parquet files. A `pomona.spark.tasks.ChunkTask`."""

    chunks: str
    sources: tuple[Source | None, ...]
    recogniser: Recogniser
    folder: str

    def write(self, photos: pa.RecordBatch, number: int, folder: str) -> dict[str, Any]:
        """Write the answers of chunk ``number``."""
        from pomona.spark.tasks import at_task

        fitted = replace(self.recogniser, spec=at_task(self.recogniser.spec))
        path = Path(folder, part_name(number))
        with atomic_file(path) as part, pq.ParquetWriter(part, ROWS) as writer:
            for batch in answers(photos, self.sources[number], fitted):
                writer.write_batch(batch)
        return {}

    def done(self) -> set[int]:
        """Return the chunks whose answers are in place."""
        names = {path.name for path in Path(self.folder).glob("part-*.parquet")}
        return {number for number in range(len(self.sources)) if part_name(number) in names}

    def careful(self) -> PredictTask:
        """Return the task as it decodes photos in child processes."""
        spec = replace(self.recogniser.spec, guard="child")
        return replace(self, recogniser=replace(self.recogniser, spec=spec))


def part_name(number: int) -> str:
    """Return the name of a chunk's answers."""
    return f"part-{number:05d}.parquet"


def answers(
    photos: pa.RecordBatch, source: Source | None, found: Recogniser
) -> Iterator[pa.RecordBatch]:
    """Yield the answers for photos of one source, as `ROWS`, a few at a time. Runs on workers."""
    size = found.spec.batch_size
    batches = (photos.slice(start, size) for start in range(0, photos.num_rows, size))
    with_bytes = _standard_input(batches) if source is None else read(batches, source)
    for batch in recognise(with_bytes, found):
        shown = batch["shown"]
        columns = [batch[name] for name in ANSWERS.names]
        yield pa.RecordBatch.from_arrays([shown, *columns], schema=ROWS)


def _standard_input(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        content = sys.stdin.buffer.read(MAX_BYTES + 1)
        yield with_content(batch, [content] * batch.num_rows)


def predict(
    arguments: list[str],
    found: Model,
    options: PredictOptions | None = None,
    on_tick: OnTick = quiet,
    on_answers: Callable[[pa.RecordBatch], None] | None = None,
) -> dict[str, Any]:
    """Answer for all photos of the arguments.

    Parameters
    ----------
    on_answers
        Gets the answers, as `ROWS`, in the order of the arguments; not used with ``options.out``,
        where they become Parquet files.

    Returns
    -------
    dict
        ``photos``, ``unknown``, ``rejected`` (by code), ``labels`` (photos by label), ``seconds``,
        ``model`` (its version), ``out``.

    Raises
    ------
    RequestError
        And its kinds.
    JobError
        If Spark gave up. What is done is kept, with ``options.out``.
    """
    options = options or PredictOptions()
    elsewhere = options.master is not None and _gpus_elsewhere(options)
    recogniser = make_recogniser(found, options.top, device=options.device, elsewhere=elsewhere)
    wanted = find(arguments, on_tick)
    count = sum(part.photos.num_rows for part in wanted)
    if options.most and count > options.most and options.out is None:
        raise RequestError(
            f"{count:,} photos are too many for a table: add --out FOLDER (Parquet), --csv or "
            "--json"
        )
    start = time.time()
    tally = Tally()
    by_spark = options.master is not None or count > SPARK_ABOVE
    if options.out is None and not by_spark:
        recogniser = with_threads(recogniser, available_cpus())
        for batch in _directly(wanted, recogniser):
            tally.add(batch)
            if count > WORTH_TELLING:
                on_tick(Tick("predict", tally.photos, count, sum(tally.rejected.values())))
            if on_answers:
                on_answers(batch)
    else:
        with tempfile.TemporaryDirectory() as spare:
            folder = Path(options.out or spare).expanduser().resolve()
            parts = _to_files(wanted, recogniser, folder, found, options, on_tick, by_spark)
            for part in parts:
                for batch in pq.ParquetFile(part).iter_batches():
                    tally.add(batch)
                    if on_answers and options.out is None:
                        on_answers(batch)
    return {
        **tally.record(),
        "seconds": round(time.time() - start, 2),
        "model": found.version,
        "out": options.out,
    }


def _gpus_elsewhere(options: PredictOptions) -> bool:
    from pomona.spark.resources import gpus_elsewhere
    from pomona.spark.session import Cluster

    cluster = Cluster(options.master or "local[*]", options.spark_conf)
    return gpus_elsewhere(cluster, options.device)


def _directly(wanted: list[Wanted], recogniser: Recogniser) -> Iterator[pa.RecordBatch]:
    for part in wanted:
        for photos in part.photos.to_batches():
            yield from answers(photos, part.source, recogniser)


class Tally:
    """Count answers."""

    def __init__(self) -> None:
        self.photos = self.unknown = 0
        self.rejected: Counter[str] = Counter()
        self.labels: Counter[str] = Counter()

    def add(self, batch: pa.RecordBatch) -> None:
        """Count a batch of `ROWS`."""
        self.photos += batch.num_rows
        self.unknown += sum(bool(value) for value in batch["unknown"].to_pylist())
        self.rejected.update(code for code in batch["error"].to_pylist() if code)
        self.labels.update(label for label in batch["label"].to_pylist() if label)

    def record(self) -> dict[str, Any]:
        """Return the counts."""
        return {
            "photos": self.photos,
            "unknown": self.unknown,
            "rejected": dict(sorted(self.rejected.items())),
            "labels": dict(self.labels.most_common()),
        }


# --- into files --------------------------------------------------------------------------------


def _to_files(
    wanted: list[Wanted],
    recogniser: Recogniser,
    folder: Path,
    found: Model,
    options: PredictOptions,
    on_tick: OnTick,
    by_spark: bool,
) -> list[Path]:
    """Answer into Parquet files; what an earlier run of the same request did isn't done again."""
    if any(part.source is None for part in wanted):
        raise RequestError("standard input is one photo: leave --out and --master out")
    bounds, places = _cut(wanted)
    photos = pa.concat_tables([part.photos for part in wanted])
    _claim(folder, _request(photos, found, options))
    todo = [n for n in range(len(places)) if not (folder / part_name(n)).exists()]
    total = photos.num_rows

    def poll() -> None:
        there = {path.name for path in folder.glob("part-*.parquet")}
        done = sum(bounds[n + 1] - bounds[n] for n in range(len(places)) if part_name(n) in there)
        on_tick(Tick("predict", done, total))

    if todo:
        chunks = folder / "_todo.arrow"
        write_chunks(chunks, photos, bounds)
        task = PredictTask(str(chunks), tuple(places), recogniser, str(folder))
        _run(task, todo, folder, options, on_tick, poll, by_spark)
        chunks.unlink()
    poll()
    return [folder / part_name(n) for n in range(len(places))]


def _cut(wanted: list[Wanted]) -> tuple[list[int], list[Source | None]]:
    """Cut photos into chunks of one source each: bounds, and the source of each chunk."""
    bounds, places = [0], []
    for part in wanted:
        cuts = even_bounds(part.photos.num_rows, PER_TASK)[1:]
        first = bounds[-1]
        bounds += [first + cut for cut in cuts]
        places += [part.source] * len(cuts)
    return bounds, places


def _request(photos: pa.Table, found: Model, options: PredictOptions) -> dict[str, Any]:
    sha = hashlib.sha256("\0".join(photos["shown"].to_pylist()).encode())
    return {
        "format": FORMAT,
        "model": found.about["digests"]["model.onnx"],
        "photos_digest": sha.hexdigest(),
        "photos": photos.num_rows,
        "top": options.top,
        "threshold": found.about["unknown"]["threshold"],
    }


def _claim(folder: Path, request: dict[str, Any]) -> None:
    """Take a folder for the answers to a request, or refuse it if it holds something else."""
    about = folder / "_answers.json"
    old = read_json(about)
    if old and old != request:
        raise MismatchError(
            f"{folder} holds answers for other photos or of another model: choose another --out"
        )
    if not old and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"--out {folder} is not an empty folder: choose a new one")
    try:
        write_json(about, request)
    except OSError as error:
        raise RequestError(f"--out {folder} can't be written: {error.strerror}") from error


def _run(
    task: PredictTask,
    todo: list[int],
    folder: Path,
    options: PredictOptions,
    on_tick: OnTick,
    poll: Callable[[], None],
    by_spark: bool,
) -> None:
    if not by_spark:
        fitted = with_threads(task.recogniser, available_cpus())
        for number in todo:
            poll()
            photos = read_chunk(task.chunks, number)
            replace(task, recogniser=fitted).write(photos, number, task.folder)
        return
    from pomona.spark import executors
    from pomona.spark.resources import fit_spec
    from pomona.spark.session import Cluster, session

    on_tick(Tick("spark"))
    cluster = Cluster(options.master or "local[*]", options.spark_conf, folder / "_spark.log")
    with session(cluster) as spark:
        fitted = replace(task.recogniser, spec=fit_spec(task.recogniser.spec, spark))
        for source, number in {task.sources[n]: n for n in reversed(todo)}.items():
            if source is not None:
                few = read_chunk(task.chunks, number)["path"][:5].to_pylist()
                executors.check(spark, fitted.spec.backend, source, few)
        executors.run_chunks(spark, replace(task, recogniser=fitted), todo, folder, poll)
