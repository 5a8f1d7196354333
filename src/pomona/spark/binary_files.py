"""Photos as Spark DataFrames: URIs that only Hadoop knows, and `load_images` for notebooks."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from pomona.core.errors import (
    RequestError,
    SourceError,
    first_line,
)
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


def modified_in_hadoop(spark: SparkSession, uri: str) -> int:
    """Return a file's time in milliseconds; 0 over Spark Connect, where Hadoop is out of reach."""
    try:
        path = spark.sparkContext._jvm.org.apache.hadoop.fs.Path(uri)
        conf = spark.sparkContext._jsc.hadoopConfiguration()
        return int(path.getFileSystem(conf).getFileStatus(path).getModificationTime())
    except Exception as error:  # noqa: BLE001 - no JVM over Connect; or the file has gone since
        log.warning("no time for %s: %s", uri, first_line(error))
        return 0


BINARY_FILE = pa.schema(
    [
        ("path", pa.string()),
        ("modificationTime", pa.timestamp("us", tz="UTC")),
        ("length", pa.int64()),
        ("content", pa.binary()),
    ]
)


def binary_files(spark: SparkSession, root: str) -> DataFrame:
    """Return the photos of a Hadoop URI through Spark's ``binaryFile``, as `BINARY_FILE`. Lazy."""
    suffixes = ",".join(f"*{suffix}" for suffix in SUFFIXES)
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
        frame = binary_files(spark, source.root)
        table = frame.select("path", "length", "modificationTime").toArrow()
        inputs = [unquote(uri) for uri in frame.inputFiles()]
    except Exception as error:
        log.exception("binaryFile can't list")
        raise SourceError(f"{source.root} can't be listed: {root_cause(error)}") from error
    modified = pc.cast(table["modificationTime"], pa.int64())
    whole = pc.multiply(pc.divide(modified, 1000), 1000)
    paths = hadoop_relative(table["path"], source.root)
    columns = [paths, table["length"], pc.cast(whole, FILES.field("modified").type)]
    scanned = pa.table(columns, schema=FILES)
    return Listing(pa.concat_tables([scanned, _empty_files(spark, source.root, inputs, paths)]))


def _empty_files(
    spark: SparkSession, root: str, inputs: list[str], scanned: pa.ChunkedArray
) -> pa.Table:
    """Return the planned files that the scan passed over: their size is 0."""
    relative = hadoop_relative(pa.chunked_array([pa.array(inputs, pa.string())]), root)
    seen = set(scanned.to_pylist())
    rows = [
        (path, 0, modified_in_hadoop(spark, uri))
        for path, uri in zip(relative.to_pylist(), inputs, strict=True)
        if path not in seen
    ]
    times = pa.array([row[2] * 1000 for row in rows], pa.int64()).cast(FILES.field("modified").type)
    return pa.table([[row[0] for row in rows], [row[1] for row in rows], times], schema=FILES)


def hadoop_relative(paths: pa.ChunkedArray, root: str) -> pa.ChunkedArray:
    """Hadoop writes file:/x where the user wrote file:///x: compare what follows the authority."""
    bare = pc.replace_substring_regex(paths, r"^[A-Za-z][A-Za-z0-9+.-]*:(//[^/]*)?", "")
    start = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*:(//[^/]*)?", "", root).rstrip("/")
    return pc.utf8_slice_codeunits(bare, len(start) + 1)


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
            paths = hadoop_relative(pa.chunked_array([batch["path"]]), self.root).to_pylist()
            here = [number for number, path in enumerate(paths) if path in self._places]
            rows = self.photos.take(pa.array([self._places[paths[n]] for n in here], pa.int64()))
            contents = [batch["content"][number].as_py() for number in here]
            for photos in rows.combine_chunks().to_batches():
                yield reading.with_content(photos, contents)


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

    named = photos.select(["path", "label", "filename"])
    if source.kind == "hadoop":
        frame = binary_files(spark, source.root).select(*BINARY_FILE.names)
        with_bytes = functools.partial(_select_images, HadoopPhotos(source.root, named))
    else:
        frame = spark.createDataFrame(named)
        with_bytes = functools.partial(_select_images, functools.partial(_read_small, source))
    return frame.mapInArrow(with_bytes, ddl(IMAGES))


def _read_small(source: Source, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    return reading.read(sliced(batches, 8), source)  # bounds the bytes held at a time


def _select_images(
    read: Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]],
    batches: Iterator[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    for batch in read(batches):
        yield batch.select(IMAGES.names)
