"""The stage ``predict``: photos, folders, URIs or standard input become answers."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pomona.backbone.spec import BackboneSpec
from pomona.core.errors import MismatchError, RequestError, SourceError
from pomona.core.files import FORMAT, atomic_file, read_json, write_json
from pomona.core.parquet import even_bounds, read_chunk, sliced, write_chunks
from pomona.core.progress import OnTick, Tick, quiet
from pomona.core.uris import local_path
from pomona.model.artifact import Model
from pomona.model.recogniser import ANSWERS, Recogniser, for_driver, make_recogniser, recognise
from pomona.photos.listing import list_files
from pomona.photos.reading import read, with_content
from pomona.photos.source import MAX_BYTES, SUFFIXES, Source, is_photo, open_source
from pomona.pipeline.engines import open_engine, wants_spark
from pomona.spark.resources import gpus_elsewhere
from pomona.spark.session import Cluster

STDIN = "-"
ALONE = 200
"""Photos that this process answers by itself: workers take a second to start."""
PER_TASK = 256
SHOW_PROGRESS_ABOVE = 100
"""Photos: fewer are answered before a progress bar is read."""

PHOTOS = pa.schema([("path", pa.string()), ("shown", pa.string())])
"""The path in the source, and the path that is shown with the answer."""
ROWS = pa.schema([("path", pa.string()), *ANSWERS])
"""An answer of `predict`; ``path`` is the argument, with the rest of the way for a folder."""

OnAnswers = Callable[[pa.RecordBatch], None]
PhotoSet = tuple[Source | None, pa.Table]
"""The photos of one argument: where they lie (None: standard input), and `PHOTOS`."""


@dataclass(frozen=True)
class PredictOptions:
    """How photos become answers; see ``pomona predict --help``."""

    top: int = 3
    device: str = "auto"
    out: str | None = None
    most: int | None = None  # photos, where the answers don't go into files
    cluster: Cluster = field(default_factory=Cluster)  # that works, above a few photos


def _find_photos(argument: str, on_tick: OnTick) -> PhotoSet:
    """Find the photos of an argument; SourceError if it doesn't exist, or holds no photos."""
    if argument == STDIN:
        return _one_photo(None, STDIN, STDIN)
    path = local_path(argument)
    if "://" not in argument or argument.startswith("file://"):
        if path.is_file():
            return _one_photo(open_source(path.parent), path.name, argument)
        if not path.exists():
            raise SourceError(f"there is no {argument}: give a photo, a folder or a URI")
    source = open_source(argument)
    if source.kind == "object" and is_photo(source.root):
        folder, _, name = source.root.rpartition("/")
        return _one_photo(replace(source, root=folder), name, source.name)
    if source.kind == "hadoop":
        raise SourceError(
            f"{argument}: predict reads local folders, s3:// and gs://; for other URIs make "
            "features with pomona extract first"
        )
    return _photos_in(source, argument, on_tick)


def _one_photo(source: Source | None, name: str, shown: str) -> PhotoSet:
    return source, pa.table([[name], [shown]], schema=PHOTOS)


def _photos_in(source: Source, argument: str, on_tick: OnTick) -> PhotoSet:
    def tick(count: int) -> None:
        if count > SHOW_PROGRESS_ABOVE:
            on_tick(Tick("list", count))

    files = list_files(source, tick).files
    if not files.num_rows:
        raise SourceError(f"{argument} holds no photos: they end in {' '.join(SUFFIXES)}")
    paths = files.sort_by("path")["path"]
    start = source.name if source.kind == "object" else argument.rstrip("/")
    shown = pa.array([f"{start}/{path}" for path in paths.to_pylist()], pa.string())
    return source, pa.table([paths, shown], schema=PHOTOS)


def predict(
    arguments: list[str],
    model: Model,
    options: PredictOptions | None = None,
    on_tick: OnTick = quiet,
    on_answers: OnAnswers | None = None,
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
        If the workers gave up. What is done is kept, with ``options.out``.
    """
    options = options or PredictOptions()
    elsewhere = wants_spark(options.cluster) and gpus_elsewhere(options.cluster, options.device)
    recogniser = make_recogniser(model, options.top, device=options.device, elsewhere=elsewhere)
    if not arguments:
        raise RequestError("predict takes photos, folders, URIs, or - for standard input")
    if arguments.count(STDIN) > 1:
        raise RequestError("standard input can be read once: give - once")
    photo_sets = [_find_photos(argument, on_tick) for argument in arguments]
    count = sum(photos.num_rows for _, photos in photo_sets)
    if options.most and count > options.most and options.out is None:
        raise RequestError(
            f"{count:,} photos are too many for a table: add --out FOLDER (Parquet), --csv or "
            "--json"
        )
    start = time.time()
    with contextlib.closing(_answers(photo_sets, recogniser, model, options, on_tick)) as batches:
        counts = _count(batches, None if options.out else on_answers)
    seconds = round(time.time() - start, 2)
    return {**counts, "seconds": seconds, "model": model.version, "out": options.out}


def _count(batches: Iterator[pa.RecordBatch], on_answers: OnAnswers | None) -> dict[str, Any]:
    """Count answers and hand them on."""
    photos = unknown = 0
    rejected: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    for batch in batches:
        photos += batch.num_rows
        unknown += batch["unknown"].to_pylist().count(True)
        rejected.update(batch["error"].drop_null().to_pylist())
        labels.update(batch["label"].drop_null().to_pylist())
        if on_answers:
            on_answers(batch)
    return {
        "photos": photos,
        "unknown": unknown,
        "rejected": dict(sorted(rejected.items())),
        "labels": dict(labels.most_common()),
    }


def _answers(
    photo_sets: list[PhotoSet],
    recogniser: Recogniser,
    model: Model,
    options: PredictOptions,
    on_tick: OnTick,
) -> Generator[pa.RecordBatch, None, None]:
    """Yield the answers as `ROWS`, by this process, or by workers through files."""
    count = sum(photos.num_rows for _, photos in photo_sets)
    by_workers = options.cluster.master is not None or count > ALONE
    if options.out is None and not by_workers:
        yield from _answer_here(photo_sets, count, recogniser, on_tick)
        return
    with tempfile.TemporaryDirectory() as spare:
        folder = Path(options.out or spare).expanduser().resolve()
        for part in _write_files(
            photo_sets, recogniser, folder, model, options, on_tick, by_workers
        ):
            yield from pq.ParquetFile(part).iter_batches()


def _answer_here(
    photo_sets: list[PhotoSet], count: int, recogniser: Recogniser, on_tick: OnTick
) -> Iterator[pa.RecordBatch]:
    recogniser = for_driver(recogniser)
    done = rejected = 0
    for source, photos in photo_sets:
        for some in photos.to_batches():
            for batch in _answer(some, source, recogniser):
                done += batch.num_rows
                rejected += batch.num_rows - batch["error"].null_count
                if count > SHOW_PROGRESS_ABOVE:
                    on_tick(Tick("predict", done, count, rejected))
                yield batch


def _answer(
    photos: pa.RecordBatch, source: Source | None, recogniser: Recogniser
) -> Iterator[pa.RecordBatch]:
    """Yield the answers for photos of one source, as `ROWS`, a few at a time. Runs on workers."""
    batches = sliced([photos], recogniser.spec.batch_size)  # before reading: it bounds the bytes
    with_bytes = _standard_input(batches) if source is None else read(batches, source)
    for batch in recognise(with_bytes, recogniser):
        columns = [batch[name] for name in ("shown", *ANSWERS.names)]
        yield pa.RecordBatch.from_arrays(columns, schema=ROWS)


def _standard_input(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        content = sys.stdin.buffer.read(MAX_BYTES + 1)
        yield with_content(batch, [content] * batch.num_rows)


@dataclass(frozen=True)
class PredictTask:
    """Answer chunks of photos into Parquet files. A `pomona.engine.engine.ChunkTask`."""

    chunks: str
    sources: tuple[Source | None, ...]
    recogniser: Recogniser
    folder: str

    def write(self, photos: pa.RecordBatch, number: int, folder: str) -> dict[str, Any]:
        """Write the answers of chunk ``number``. Runs on workers."""
        path = Path(folder, _part_name(number))
        with atomic_file(path) as part, pq.ParquetWriter(part, ROWS) as writer:
            for batch in _answer(photos, self.sources[number], self.recogniser):
                writer.write_batch(batch)
        return {}

    def done(self) -> set[int]:
        """Return the chunks whose answers are in place."""
        names = {path.name for path in Path(self.folder).glob("part-*.parquet")}
        return {number for number in range(len(self.sources)) if _part_name(number) in names}

    def with_spec(self, change: Callable[[BackboneSpec], BackboneSpec]) -> PredictTask:
        """Return the task with another spec."""
        spec = change(self.recogniser.spec)
        return replace(self, recogniser=replace(self.recogniser, spec=spec))


def _part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _write_files(
    photo_sets: list[PhotoSet],
    recogniser: Recogniser,
    folder: Path,
    model: Model,
    options: PredictOptions,
    on_tick: OnTick,
    by_workers: bool,
) -> list[Path]:
    """Answer into Parquet files; what an earlier run of the same request did isn't done again."""
    if any(source is None for source, _ in photo_sets):
        raise RequestError("standard input is one photo: leave --out and --master out")
    bounds, sources = _cut(photo_sets)
    photos = pa.concat_tables([photos for _, photos in photo_sets])
    _claim(folder, _request(photos, model, options))
    chunks = folder / "_todo.arrow"
    task = PredictTask(str(chunks), tuple(sources), recogniser, str(folder))

    def poll() -> None:
        done = sum(bounds[number + 1] - bounds[number] for number in task.done())
        on_tick(Tick("predict", done, photos.num_rows))

    if todo := sorted(set(range(len(sources))) - task.done()):
        write_chunks(chunks, photos, bounds)
        if by_workers:
            on_tick(Tick("start"))
            cluster = replace(options.cluster, log_file=folder / "_workers.log")
            _run_on_workers(task, todo, cluster, poll)
        else:
            here = replace(task, recogniser=for_driver(recogniser))
            for number in todo:
                poll()
                here.write(read_chunk(task.chunks, number), number, task.folder)
        chunks.unlink()
    poll()
    return [folder / _part_name(number) for number in range(len(sources))]


def _cut(photo_sets: list[PhotoSet]) -> tuple[list[int], list[Source | None]]:
    """Cut photos into chunks of one source each: bounds, and the source of each chunk."""
    bounds: list[int] = [0]
    sources: list[Source | None] = []
    for source, photos in photo_sets:
        first = bounds[-1]
        ends = [first + end for end in even_bounds(photos.num_rows, PER_TASK)[1:]]
        bounds += ends
        sources += [source] * len(ends)
    return bounds, sources


def _request(photos: pa.Table, model: Model, options: PredictOptions) -> dict[str, Any]:
    """Return what must agree for a later run to go on with the files of an earlier one."""
    sha = hashlib.sha256("\0".join(photos["shown"].to_pylist()).encode())
    return {
        "format": FORMAT,
        "model": model.about["digests"]["model.onnx"],
        "photos_digest": sha.hexdigest(),
        "photos": photos.num_rows,
        "top": options.top,
        "threshold": model.about["unknown"]["threshold"],
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


def _run_on_workers(
    task: PredictTask, todo: list[int], cluster: Cluster, poll: Callable[[], None]
) -> None:
    with open_engine(cluster, task.recogniser.spec.device) as engine:
        task = task.with_spec(engine.fit)
        first_chunks = {task.sources[number]: number for number in reversed(todo)}
        for source, number in first_chunks.items():
            if source is not None:
                some = read_chunk(task.chunks, number)["path"][:5].to_pylist()
                engine.check(task.recogniser.spec, source, some)
        engine.run_chunks(task, todo, Path(task.folder), poll)
