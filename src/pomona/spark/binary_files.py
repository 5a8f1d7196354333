"""Photos as Spark DataFrames: sources that only Hadoop reads, and `load_images`."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from pomona.core.errors import RequestError, SourceError, first_line
from pomona.core.parquet import sliced
from pomona.core.schema import FILES, IMAGES, ddl
from pomona.photos import reading
from pomona.photos.listing import Listing, list_files
from pomona.photos.source import SUFFIXES, Source, arrange, open_source
from pomona.spark import executors
from pomona.spark.session import root_cause

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger("pomona")

Read = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]


def modified_in_hadoop(spark: SparkSession, uri: str) -> int:
    """Return a file's modification time in ms; 0 over Spark Connect, which can't ask Hadoop."""
    try:
        path = spark.sparkContext._jvm.org.apache.hadoop.fs.Path(uri)
        conf = spark.sparkContext._jsc.hadoopConfiguration()
        return int(path.getFileSystem(conf).getFileStatus(path).getModificationTime())
    except Exception as error:  # noqa: BLE001 - no JVM over Connect, or the file is deleted
        log.warning("no modification time of %s: %s", uri, first_line(error))
        return 0


def binary_files(spark: SparkSession, root: str) -> DataFrame:
    """Return the photos of a Hadoop URI through Spark's ``binaryFile``. Lazy.

    Columns: ``path``, ``modificationTime`` (us), ``length`` (bytes), ``content``.
    """
    suffixes = ",".join(f"*{suffix}" for suffix in SUFFIXES)
    pattern = re.sub(r"[a-z]", lambda m: f"[{m[0]}{m[0].upper()}]", suffixes)
    return (
        spark.read.format("binaryFile")
        .option("recursiveFileLookup", "true")
        .option("pathGlobFilter", "{" + pattern + "}")
        # A file that vanishes or can't be read gives no row here; extract adds one for it.
        .option("ignoreMissingFiles", "true")
        .option("ignoreCorruptFiles", "true")
        .load(re.sub(r"([\\{}\[\]*?])", r"\\\1", root))  # a path, not a glob
    )


def list_hadoop(spark: SparkSession, source: Source) -> Listing:
    """List a source through Spark's ``binaryFile``, without reading contents.

    Hadoop skips names that start with ``_`` or ``.``. Spark's scan skips empty files too; those are
    taken from the list of files that the scan was planned on. Raises SourceError if that fails.
    """
    try:
        frame = binary_files(spark, source.root)
        table = frame.select("path", "length", "modificationTime").toArrow()
        planned = [unquote(uri) for uri in frame.inputFiles()]
    except Exception as error:
        log.exception("binaryFile can't list")
        raise SourceError(f"{source.root} can't be listed: {root_cause(error)}") from error
    microseconds = pc.cast(table["modificationTime"], pa.int64())
    modified = pc.multiply(pc.divide(microseconds, 1000), 1000)  # whole milliseconds, as `FILES`
    paths = hadoop_relative(table["path"], source.root)
    columns = [paths, table["length"], pc.cast(modified, FILES.field("modified").type)]
    scanned = pa.table(columns, schema=FILES)
    return Listing(pa.concat_tables([scanned, _empty_files(spark, source.root, planned, paths)]))


def _empty_files(
    spark: SparkSession, root: str, planned: list[str], scanned: pa.ChunkedArray
) -> pa.Table:
    """Return the planned files that the scan skipped: their size is 0."""
    relative = hadoop_relative(pa.chunked_array([pa.array(planned, pa.string())]), root)
    seen = set(scanned.to_pylist())
    uris = dict(zip(relative.to_pylist(), planned, strict=True))
    paths = [path for path in uris if path not in seen]
    microseconds = [1000 * modified_in_hadoop(spark, uris[path]) for path in paths]
    modified = pa.array(microseconds, pa.int64()).cast(FILES.field("modified").type)
    return pa.table([paths, [0] * len(paths), modified], schema=FILES)


def hadoop_relative(paths: pa.ChunkedArray, root: str) -> pa.ChunkedArray:
    """Return Hadoop's URIs relative to the source.

    Scheme and authority are left out first: Hadoop writes file:/x where the user wrote file:///x.
    """
    origin = r"^[A-Za-z][A-Za-z0-9+.-]*:(//[^/]*)?"
    start = re.sub(origin, "", root).rstrip("/")
    bare = pc.replace_substring_regex(paths, origin, "")
    return pc.utf8_slice_codeunits(bare, len(start) + 1)


class HadoopPhotos:
    """Join ``binaryFile``'s rows with a list of photos, by path. Picklable; runs on workers."""

    def __init__(self, root: str, photos: pa.Table) -> None:
        self.root = root
        self.photos = photos.combine_chunks()
        self._rows: dict[str, int] = {}  # row of each path, made on the worker

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the photos that are in the list, with ``content``."""
        if not self._rows:
            self._rows = {path: n for n, path in enumerate(self.photos["path"].to_pylist())}
        for batch in batches:
            paths = hadoop_relative(pa.chunked_array([batch["path"]]), self.root).to_pylist()
            listed = [n for n, path in enumerate(paths) if path in self._rows]
            rows = pa.array([self._rows[paths[n]] for n in listed], pa.int64())
            contents = [batch["content"][n].as_py() for n in listed]
            for photos in self.photos.take(rows).combine_chunks().to_batches():
                yield reading.with_content(photos, contents)


def load_images(spark: SparkSession, path: str, split: str | None = None) -> DataFrame:
    """Load photos as a DataFrame with ``path``, ``content``, ``label`` and ``filename``.

    Parameters
    ----------
    path
        A source: a folder, an archive or a URI.
    split
        ``Training`` or ``Test``; all photos by default.

    Returns
    -------
    DataFrame
        Lazy: ``content`` (binary) is read when the frame is used, and null where a photo can't be
        read. In a source that only Hadoop reads, empty and deleted files give no row.

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
    >>> from pomona.photos.synthetic import synthesize
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
    source = open_source(path)
    listing = list_hadoop(spark, source) if source.kind == "hadoop" else list_files(source)
    photos = arrange(listing.files, root=source.folder)
    if split is not None:
        if split not in ("Training", "Test"):
            raise RequestError(f"a split is Training or Test, not {split}")
        photos = photos.filter(pc.equal(photos["split"], split))
    if not photos.num_rows:
        raise SourceError(f"{path} holds no photos" + (f" in {split}" if split else ""))

    photos = photos.select(["path", "label", "filename"])
    read: Read
    if source.kind == "hadoop":
        frame = binary_files(spark, source.root).select("path", "content")
        read = HadoopPhotos(source.root, photos)
    else:
        frame = spark.createDataFrame(photos)
        read = functools.partial(_read_slices, source)
    return frame.mapInArrow(functools.partial(_select_images, read), ddl(IMAGES))


def _read_slices(source: Source, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Read eight photos at a time, so that a worker stays small. Runs on workers."""
    return reading.read(sliced(batches, 8), source)


def _select_images(read: Read, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Read photos and return the columns `IMAGES`. Runs on workers."""
    return (batch.select(IMAGES.names) for batch in read(batches))
