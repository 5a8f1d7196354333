"""A column of photos gets columns beside it: features (`add_features`), or predictions.

Everything is lazy, and works over Spark Connect too: only ``mapInArrow`` runs on executors. Photos
come in the Arrow batches that Spark makes, of 64 MB at most (``maxBytesPerBatch``); a worker
decodes a few rows of a batch at a time.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from pomona.backbone.extract import extract
from pomona.backbone.spec import BackboneSpec
from pomona.core.errors import RequestError
from pomona.core.parquet import sliced
from pomona.core.schema import nulls
from pomona.model.artifact import Model, load_model
from pomona.model.recogniser import ANSWERS, Recogniser, make_recogniser, recognise, with_threads
from pomona.photos.reading import read_uris
from pomona.spark import executors
from pomona.spark.resources import fit_spec, gives_gpus
from pomona.spark.tasks import at_task

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger("pomona")

Work = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]
"""Batches with ``content`` to batches of as many rows with computed columns."""


def add_features(
    frame: DataFrame,
    column: str,
    spec: BackboneSpec,
    features: str = "features",
    error: str = "error",
    *,
    strict: bool = False,
) -> DataFrame:
    """Add the features of a column of photos, and an error code where there are none. Lazy.

    The column holds bytes (binary), or paths and URIs (string) that workers can read. The new ones,
    ``features`` and ``error``, hold an array<float> of 1280 or null, and an error code or null. If
    ``strict``, a photo that can't be used stops the job. Raises RequestError if there is no such
    column, its type is another, or a new name is taken.
    """
    spec = fit_spec(spec, frame.sparkSession)
    arrays = pa.field("features", pa.list_(pa.float32()))
    columns = [(features, arrays), (error, pa.field("error", pa.string()))]
    work = functools.partial(_extract_at_task, spec=spec)
    return _add(frame, column, work, spec.batch_size, columns, strict=strict)


def predict_images(
    frame: DataFrame,
    model: str | Path | Model,
    top: int = 3,
    *,
    column: str | None = None,
    prefix: str = "predicted_",
    device: str = "auto",
) -> DataFrame:
    """Add a model's answers to a frame of photos. Lazy; all other columns stay as they are.

    Parameters
    ----------
    frame
        Photos in ``content`` (bytes), as `load_images` gives them, or in ``path`` (absolute paths
        or URIs that workers can read).
    model
        Folder of a model, such as OUT/model, read on the driver; or what
        `pomona.model.artifact.load_model` returned.
    top
        How many labels to give for each photo.
    column
        Name of the column of photos, if it is another.
    prefix
        Prefix of the new columns' names: ``predicted_label`` stands beside the ``label`` that
        `load_images` gives.
    device
        ``auto``, ``cpu`` or ``cuda``.

    Returns
    -------
    DataFrame
        The columns of ``frame``, then those of `pomona.model.recogniser.ANSWERS`. A photo that
        can't be used has nulls and an error code in ``predicted_error``.

    Raises
    ------
    RequestError
        If there is no model or no column of photos, or a new name is taken.
    MismatchError
        If a file of the model was changed.
    """
    model = model if isinstance(model, Model) else load_model(model)
    recogniser = make_recogniser(model, top, device=device, elsewhere=gives_gpus())
    spec = fit_spec(recogniser.spec, frame.sparkSession)
    recogniser = with_threads(recogniser, spec.threads)
    work = functools.partial(_predict_at_task, recogniser=recogniser)
    if column is None:
        column = "content" if "content" in frame.columns else "path"
    columns = [(f"{prefix}{field.name}", field) for field in ANSWERS]
    return _add(frame, column, work, spec.batch_size, columns)


def _extract_at_task(
    batches: Iterator[pa.RecordBatch], spec: BackboneSpec
) -> Iterator[pa.RecordBatch]:
    """Extract features. Runs on workers."""
    return extract(batches, at_task(spec))


def _predict_at_task(
    batches: Iterator[pa.RecordBatch], recogniser: Recogniser
) -> Iterator[pa.RecordBatch]:
    """Recognise photos. Runs on workers."""
    return recognise(batches, replace(recogniser, spec=at_task(recogniser.spec)))


def _add(
    frame: DataFrame,
    column: str,
    work: Work,
    batch_size: int,
    new: list[tuple[str, pa.Field]],
    *,
    strict: bool = False,
) -> DataFrame:
    """Add columns: ``new`` holds the name of each, and the field that ``work`` computes for it."""
    place, are_paths = _find(frame, column)
    added = pa.schema([field.with_name(name) for name, field in new])
    _refuse_duplicates(frame.columns, added.names)
    if not are_paths:
        _check_batches(frame.sparkSession)
    schema = frame.selectExpr("*", *nulls(added)).schema
    computed = tuple(field.name for _, field in new)
    columns = (*frame.columns, *added.names)
    on_worker = AddColumns(work, place, are_paths, batch_size, columns, computed, strict)
    executors.ship(frame.sparkSession)
    # Columns by number: a name may hold dots, or occur twice. The schema restores the names.
    numbered = frame.toDF(*map(str, range(len(frame.columns))))
    return numbered.mapInArrow(on_worker, schema)


def _find(frame: DataFrame, column: str) -> tuple[int, bool]:
    """Return a column's position, and whether it holds paths."""
    fields = frame.schema.fields
    places = [n for n, field in enumerate(fields) if field.name == column] or [
        n for n, field in enumerate(fields) if field.name.lower() == column.lower()
    ]
    if len(places) != 1:
        what = "two columns" if places else "no column"
        raise RequestError(
            f"the frame has {what} {column}; its columns: {', '.join(frame.columns)}"
        )
    kind = fields[places[0]].dataType.typeName()
    if kind not in ("binary", "string", "varchar", "char"):
        raise RequestError(
            f"column {column} holds {kind}; photos are bytes (binary, as pomona.load_images "
            "and Spark's format binaryFile give them) or paths and URIs (string)"
        )
    return places[0], kind != "binary"


def _refuse_duplicates(columns: list[str], new: list[str]) -> None:
    taken = {name.lower() for name in columns}  # by default Spark's names ignore case
    for name in new:
        if name.lower() in taken:
            raise RequestError(
                f"the frame has a column {name} already: choose another name, or drop it first"
            )
        taken.add(name.lower())


BYTES = "spark.sql.execution.arrow.maxBytesPerBatch"
ROWS = "spark.sql.execution.arrow.maxRecordsPerBatch"
MOST_ROWS = 500
"""Rows of a batch of photos above which `_check_batches` warns if Spark doesn't limit its bytes."""


def _check_batches(spark: SparkSession) -> None:
    """Warn if Spark has no `BYTES` (4.0), so that a batch may have any number of bytes."""
    with contextlib.suppress(Exception):  # Spark raises on unknown settings
        spark.conf.get(BYTES)
        return
    rows = int(spark.conf.get(ROWS, "10000") or 0)
    if not 0 < rows <= MOST_ROWS:
        log.warning(
            "this Spark puts up to %s photos into one Arrow batch, whatever their size: set %s "
            "to 64",
            rows if rows > 0 else "any number of",
            ROWS,
        )


@dataclass(frozen=True)
class AddColumns:
    """Compute columns from the column of photos. Picklable; runs on workers."""

    work: Work
    place: int  # position of the column of photos
    are_paths: bool
    size: int  # rows that `work` gets at once, and paths whose bytes a worker reads
    names: tuple[str, ...]  # of all output columns
    computed: tuple[str, ...]  # names, in the output of `work`, of the columns to add
    strict: bool = False  # whether a photo that can't be used raises

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the same rows in the same order, with more columns."""
        photos: Iterator[pa.RecordBatch] = map(self._numbered, sliced(batches, self.size))
        for rows in self.work(read_uris(photos) if self.are_paths else photos):
            if self.strict:
                self._refuse(rows)
            inputs = range(len(self.names) - len(self.computed))
            columns = [rows[name] for name in (*map(str, inputs), *self.computed)]
            yield pa.RecordBatch.from_arrays(columns, names=self._output_names())

    def _output_names(self) -> list[str]:
        """Return unique names: Spark goes by position, but Arrow in Java merges equal names."""
        is_unique = len(set(self.names)) == len(self.names)
        return list(self.names) if is_unique else [str(n) for n in range(len(self.names))]

    def _numbered(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Name the columns by number, so that none has the name of a computed one."""
        names = [*map(str, range(batch.num_columns)), "path" if self.are_paths else "content"]
        columns = [*batch.columns, batch.column(self.place)]
        return pa.RecordBatch.from_arrays(columns, names=names)

    def _refuse(self, rows: pa.RecordBatch) -> None:
        """Raise RequestError for the first photo that can't be used."""
        for n, error in enumerate(rows["error"].to_pylist()):
            if error is not None:
                photo = rows["path"][n].as_py() if self.are_paths else "a photo"
                raise RequestError(f"{photo} can't be used: {error}")
