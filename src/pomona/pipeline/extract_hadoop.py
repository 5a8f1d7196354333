"""The stage ``extract`` for sources that only Hadoop reads: Spark reads the photos."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pomona.backbone.extract import extract
from pomona.backbone.spec import BackboneSpec
from pomona.core.errors import CrashError, RequestError
from pomona.core.schema import ddl
from pomona.engine.engine import Poll
from pomona.photos import reading
from pomona.photos.source import Source
from pomona.pipeline.verification import with_sha256
from pomona.spark import executors
from pomona.spark.binary_files import HadoopPhotos, binary_files
from pomona.spark.resources import slots
from pomona.spark.tasks import ANSWERS, answer, at_task, collect, partition
from pomona.workspace import feature_table
from pomona.workspace.feature_table import PartFile, write_part
from pomona.workspace.layout import Out

PARTITION_BYTES = 128 << 20


def run_hadoop(
    spark: Any,
    out: Out,
    source: Source,
    todo: pa.Table,
    per_task: int,
    spec: BackboneSpec,
    part: PartFile,
    poll: Poll,
) -> None:
    """Extract photos of a source that only Hadoop reads, about ``per_task`` in each partition.

    Raises RequestError if executors don't see OUT.
    """
    if not executors.share(spark, out.root):
        raise RequestError(
            f"the executors don't see {out.root}, and photos of {source.name} need that: choose an "
            "--out on storage that driver and executors share"
        )
    root = source.root

    def missing() -> pa.Table:
        rows = feature_table.match(todo, feature_table.index(out, Path(part.folder)))
        return rows.filter(pc.is_null(rows["file"])).select(todo.column_names)

    try:
        _run(spark, HadoopPhotos(root, todo), per_task, spec, part, poll)
    except CrashError:  # where a task has one try: the rest again, in child processes
        again = part._replace(run=feature_table.new_run())  # its parts are numbered from 0 again
        careful = replace(spec, guard="child")
        _run(spark, HadoopPhotos(root, missing()), per_task, careful, again, poll)
    # binaryFile gave no row for empty and unreadable photos.
    for photos in missing().combine_chunks().to_batches():
        contents = [None if size else b"" for size in photos["size"].to_pylist()]
        rows = extract(with_sha256(iter([reading.with_content(photos, contents)])), spec)
        write_part(part, todo.num_rows, rows)


def _run(
    spark: Any, photos: HadoopPhotos, per_task: int, spec: BackboneSpec, part: PartFile, poll: Poll
) -> None:
    """Let Spark read the photos and workers extract them.

    Spark counts a file as at least ``openCostInBytes``. Its default of 4 MiB puts 32 small photos
    into a partition; here it is set so that ``per_task`` fit. A run that goes on after a kill reads
    the bytes of photos that are done again, but doesn't compute their features again.
    """
    settings = {
        "spark.sql.files.maxPartitionBytes": str(PARTITION_BYTES),
        "spark.sql.files.openCostInBytes": str(PARTITION_BYTES // max(1, per_task)),
        "spark.sql.files.minPartitionNum": str(min(slots(spark), photos.photos.num_rows)),
        # The batches hold the photos' bytes: few rows, so that a worker needs little memory.
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(spec.batch_size),
    }
    on_worker = functools.partial(_hadoop_on_worker, photos, spec, part)
    with _conf(spark, settings):
        frame = binary_files(spark, photos.root).select("path", "content")
        collect(frame.mapInArrow(on_worker, ddl(ANSWERS)), poll)


def _hadoop_on_worker(
    photos: HadoopPhotos, spec: BackboneSpec, part: PartFile, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Write a partition's part and yield its counts. Runs on workers."""
    rows = extract(with_sha256(photos(batches)), at_task(spec))
    yield answer(write_part(part, partition(), rows)._asdict())


@contextlib.contextmanager
def _conf(spark: Any, settings: dict[str, str]) -> Iterator[None]:
    """Change settings of a session that may be the user's, and put them back."""
    before = {key: spark.conf.get(key, None) for key in settings}
    for key, value in settings.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key, old in before.items():
            spark.conf.unset(key) if old is None else spark.conf.set(key, old)
