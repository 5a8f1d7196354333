"""Photos as Spark DataFrames: URIs that only Hadoop knows, and `load_images` for notebooks."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from pomona import executors, sources
from pomona.backbone import BackboneSpec, extract
from pomona.engine import (
    ANSWERS,
    Answer,
    Poll,
    answer,
    at_task,
    collect,
    modified_in_hadoop,
    partition,
    root_cause,
    slots,
)
from pomona.errors import RequestError, SourceError
from pomona.schema import FILES, IMAGES, ddl
from pomona.sources import Listing, Source
from pomona.tables import PartFile, write_part

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger("pomona")

_BINARY_FILE = pa.schema(
    [
        ("path", pa.string()),
        ("modificationTime", pa.timestamp("us", tz="UTC")),
        ("length", pa.int64()),
        ("content", pa.binary()),
    ]
)


def _binary_files(spark: SparkSession, root: str) -> DataFrame:
    suffixes = ",".join(f"*{suffix}" for suffix in sources.SUFFIXES)
    pattern = re.sub(r"[a-z]", lambda m: f"[{m[0]}{m[0].upper()}]", suffixes)
    return (
        spark.read.format("binaryFile")
        .option("recursiveFileLookup", "true")
        .option("pathGlobFilter", "{" + pattern + "}")
        # A file that vanishes or can't be read gives no row here; `add_missing` gives it one.
        .option("ignoreMissingFiles", "true")
        .option("ignoreCorruptFiles", "true")
        .load(_escape_glob(root))
    )


def _escape_glob(path: str) -> str:
    return re.sub(r"([\\{}\[\]*?])", r"\\\1", path)


def list_hadoop(spark: SparkSession, source: Source) -> Listing:
    """List a source through Spark's ``binaryFile``, without reading contents.

    Hadoop passes over names that start with ``_`` or ``.``. Spark's scan passes over files of no
    bytes too, so those come from the list of files that it was planned on.
    """
    try:
        frame = _binary_files(spark, source.root)
        table = frame.select("path", "length", "modificationTime").toArrow()
        inputs = [unquote(uri) for uri in frame.inputFiles()]
    except Exception as error:
        log.exception("binaryFile can't list")
        raise SourceError(f"{source.root} can't be listed: {root_cause(error)}") from error
    modified = pc.cast(table["modificationTime"], pa.int64())
    whole = pc.multiply(pc.divide(modified, 1000), 1000)
    paths = _hadoop_relative(table["path"], source.root)
    columns = [paths, table["length"], pc.cast(whole, FILES.field("modified").type)]
    scanned = pa.table(columns, schema=FILES)
    return Listing(pa.concat_tables([scanned, _empty_files(spark, source.root, inputs, paths)]))


def _empty_files(
    spark: SparkSession, root: str, inputs: list[str], scanned: pa.ChunkedArray
) -> pa.Table:
    """Return the planned files that the scan passed over: their size is 0."""
    relative = _hadoop_relative(pa.chunked_array([pa.array(inputs, pa.string())]), root)
    seen = set(scanned.to_pylist())
    rows = [
        (path, 0, modified_in_hadoop(spark, uri))
        for path, uri in zip(relative.to_pylist(), inputs, strict=True)
        if path not in seen
    ]
    times = pa.array([row[2] * 1000 for row in rows], pa.int64()).cast(FILES.field("modified").type)
    return pa.table([[row[0] for row in rows], [row[1] for row in rows], times], schema=FILES)


def _hadoop_relative(paths: pa.ChunkedArray, root: str) -> pa.ChunkedArray:
    """Hadoop writes file:/x where the user wrote file:///x: compare what follows the authority."""
    bare = pc.replace_substring_regex(paths, r"^[A-Za-z][A-Za-z0-9+.-]*:(//[^/]*)?", "")
    start = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*:(//[^/]*)?", "", root).rstrip("/")
    return pc.utf8_slice_codeunits(bare, len(start) + 1)


PARTITION_BYTES = 128 << 20


def run_hadoop(
    spark: SparkSession,
    photos: HadoopPhotos,
    per_task: int,
    spec: BackboneSpec,
    part: PartFile,
    poll: Poll | None = None,
) -> list[Answer]:
    """Extract photos of a source that only Hadoop reads; partitions hold about ``per_task``.

    Spark counts a file as at least ``openCostInBytes``, 4 MiB by default, which puts 32 small
    photos into a partition; here it is what puts ``per_task`` there. A run that goes on after a
    kill reads again the bytes of photos that are done, and doesn't compute them again.
    """
    settings = {
        "spark.sql.files.maxPartitionBytes": str(PARTITION_BYTES),
        "spark.sql.files.openCostInBytes": str(PARTITION_BYTES // max(1, per_task)),
        "spark.sql.files.minPartitionNum": str(min(slots(spark), photos.photos.num_rows)),
        # Contents travel in the batches: few rows, so that a worker stays small.
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(spec.batch_size),
    }
    on_worker = functools.partial(_hadoop_on_worker, photos, spec, part)
    with _conf(spark, settings):
        frame = _binary_files(spark, photos.root).select(*_BINARY_FILE.names)
        return collect(frame.mapInArrow(on_worker, ddl(ANSWERS)), poll)


def _hadoop_on_worker(
    photos: HadoopPhotos, spec: BackboneSpec, part: PartFile, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    rows = extract(photos(batches), at_task(spec))
    yield answer(write_part(part, partition(), rows)._asdict())


def add_missing(missing: pa.Table, spec: BackboneSpec, part: PartFile, task: int) -> None:
    """Write a part for photos that ``binaryFile`` gave no row: empty, or unreadable."""
    for photos in missing.combine_chunks().to_batches():
        contents = [None if size else b"" for size in photos["size"].to_pylist()]
        write_part(part, task, extract(iter([sources.with_content(photos, contents)]), spec))


class HadoopPhotos:
    """Gives ``binaryFile``'s rows the columns of a list of photos. Picklable; runs on workers."""

    def __init__(self, root: str, photos: pa.Table) -> None:
        self.root = root
        self.photos = photos.combine_chunks()
        self._places: dict[str, int] = {}

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the photos that are in the list, with ``content``."""
        if not self._places:
            self._places = {path: n for n, path in enumerate(self.photos["path"].to_pylist())}
        for batch in batches:
            paths = _hadoop_relative(pa.chunked_array([batch["path"]]), self.root).to_pylist()
            here = [number for number, path in enumerate(paths) if path in self._places]
            rows = self.photos.take(pa.array([self._places[paths[n]] for n in here], pa.int64()))
            contents = [batch["content"][number].as_py() for number in here]
            for photos in rows.combine_chunks().to_batches():
                yield sources.with_content(photos, contents)


@contextlib.contextmanager
def _conf(spark: SparkSession, settings: dict[str, str]) -> Iterator[None]:
    """Change settings of a session that may be the user's, and put them back."""
    before = {key: spark.conf.get(key, None) for key in settings}
    for key, value in settings.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key, old in before.items():
            spark.conf.unset(key) if old is None else spark.conf.set(key, old)


def load_images(spark: SparkSession, path: str, split: str | None = None) -> DataFrame:
    """Load photos as a DataFrame with ``path``, ``content``, ``label`` and ``filename``.

    Parameters
    ----------
    spark
        A session.
    path
        A source.
    split
        ``Training`` or ``Test``; all photos by default.

    Returns
    -------
    DataFrame
        ``content`` (binary) is null where a photo can't be read. It is read when the frame is used.
        Of a URI that only Hadoop knows, empty files and files that are gone give no row.

    Raises
    ------
    SourceError
        If the source doesn't exist or holds no photos.

    Examples
    --------
    >>> from pyspark.sql import SparkSession
    >>> spark = SparkSession.builder.master("local[2]").getOrCreate()
    >>> from pathlib import Path
    >>> from tempfile import mkdtemp
    >>> from pomona.synthetic import synthesize
    >>> folder = mkdtemp()
    >>> synthesize(Path(folder), classes=2, images=8, workers=1)
    8
    >>> photos = load_images(spark, folder, "Training")
    >>> photos.columns
    ['path', 'content', 'label', 'filename']
    >>> sorted({row["label"] for row in photos.select("label").collect()})
    ['Apple Red 1', 'Banana']
    """
    executors.ship(spark)
    source = sources.open_source(path)
    listing = list_hadoop(spark, source) if source.kind == "hadoop" else sources.list_files(source)
    photos = sources.arrange(listing.files, root=source.folder)
    if split is not None:
        if split not in ("Training", "Test"):
            raise RequestError(f"a split is Training or Test, not {split}")
        photos = photos.filter(pc.equal(photos["split"], split))
    if not photos.num_rows:
        raise SourceError(f"{path} holds no photos" + (f" in {split}" if split else ""))

    named = photos.select(["path", "label", "filename"])
    if source.kind == "hadoop":
        frame = _binary_files(spark, source.root).select(*_BINARY_FILE.names)
        with_bytes = functools.partial(_select_images, HadoopPhotos(source.root, named))
    else:
        frame = spark.createDataFrame(named)
        with_bytes = functools.partial(_select_images, functools.partial(_read_small, source))
    return frame.mapInArrow(with_bytes, ddl(IMAGES))


def _read_small(source: Source, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    small = (b.slice(n, 8) for b in batches for n in range(0, b.num_rows, 8))
    return sources.read(small, source)


def _select_images(
    read: Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]],
    batches: Iterator[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    for batch in read(batches):
        yield batch.select(IMAGES.names)
