"""DataFrame to DataFrame: a column of photos gets columns beside it. `predict_images` is one such.

Everything is lazy, and works over Spark Connect too: only `mapInArrow` runs on executors. Photos
come in the Arrow batches that Spark makes, of 64 MB at most (``maxBytesPerBatch``); a worker looks
at a few rows of one at a time.
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
from pomona.model import artifact as models
from pomona.model.artifact import Model
from pomona.model.recogniser import ANSWERS, Recogniser, make_recogniser, recognise, with_threads
from pomona.photos.reading import read_uris
from pomona.spark import executors
from pomona.spark.resources import fit_spec, gives_gpus
from pomona.spark.tasks import at_task

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger("pomona")

Work = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]
"""Batches with ``content`` to batches with as many rows and what was made of it."""


def add_features(
    frame: DataFrame,
    column: str,
    spec: BackboneSpec,
    features: str = "features",
    error: str = "error",
    *,
    strict: bool = False,
) -> DataFrame:
    """Add the features of a column of photos, and a code where there are none. Lazy.

    Parameters
    ----------
    column
        Bytes (binary), or paths and URIs (string) that workers can read.
    features, error
        Names of the new columns: array<float> of 1280 or null, and a code or null.
    strict
        Let a photo that can't be used stop the job.

    Raises
    ------
    RequestError
        If there is no such column, it holds something else, or a new name is taken.
    """
    spec = fit_spec(spec, frame.sparkSession)
    made = [
        (features, pa.field("features", pa.list_(pa.float32()))),
        (error, pa.field("error", pa.string())),
    ]
    work = functools.partial(_extract_at_task, spec=spec)
    return _add(frame, column, work, spec.batch_size, made, strict=strict)


def predict_images(
    frame: DataFrame,
    model: str | Path | Model,
    top: int = 3,
    *,
    column: str | None = None,
    prefix: str = "predicted_",
    device: str = "auto",
) -> DataFrame:
    """Add the model's answers to a frame of photos. Lazy; all other columns stay as they are.

    Parameters
    ----------
    frame
        With photos in ``content`` (bytes), as `load_images` gives them, or whole paths or URIs that
        workers can read in ``path``.
    model
        A model's folder, such as OUT/model, read here on the driver; or what
        `pomona.model.artifact.load_model` returned.
    top
        How many labels to give for each photo.
    column
        The column of photos, where its name is another.
    prefix
        Before the names of the answer's columns: ``predicted_label`` stands beside the ``label``
        that `load_images` gives.
    device
        ``auto``, ``cpu`` or ``cuda``.

    Returns
    -------
    DataFrame
        With `pomona.model.recogniser.ANSWERS` after the columns of ``frame``. A photo that can't be
        used has nulls and a code in ``predicted_error``.

    Raises
    ------
    RequestError
        If there is no model or no column of photos, or a new name is taken.
    MismatchError
        If a file of the model was changed.
    """
    found = model if isinstance(model, Model) else models.load_model(model)
    recogniser = make_recogniser(found, top, device=device, elsewhere=gives_gpus())
    spec = fit_spec(recogniser.spec, frame.sparkSession)
    fitted = with_threads(recogniser, spec.threads)
    work = functools.partial(_predict_at_task, found=fitted)
    if column is None:
        column = "content" if "content" in frame.columns else "path"
    made = [(f"{prefix}{field.name}", field) for field in ANSWERS]
    return _add(frame, column, work, spec.batch_size, made)


def _extract_at_task(
    batches: Iterator[pa.RecordBatch], spec: BackboneSpec
) -> Iterator[pa.RecordBatch]:
    return extract(batches, at_task(spec))


def _predict_at_task(
    batches: Iterator[pa.RecordBatch], found: Recogniser
) -> Iterator[pa.RecordBatch]:
    return recognise(batches, replace(found, spec=at_task(found.spec)))


def _add(
    frame: DataFrame,
    column: str,
    work: Work,
    size: int,
    made: list[tuple[str, pa.Field]],
    *,
    strict: bool = False,
) -> DataFrame:
    place, are_paths = _find(frame, column)
    new = [name for name, _ in made]
    _refuse_twice(frame.columns, new)
    if not are_paths:
        _check_batches(frame.sparkSession)
    added = pa.schema([field.with_name(name) for name, field in made])
    schema = frame.selectExpr("*", *nulls(added)).schema
    wanted = tuple(field.name for _, field in made)
    names = (*frame.columns, *new)
    on_worker = OnPhotos(work, place, are_paths, size, names, wanted, strict)
    executors.ship(frame.sparkSession)
    # By number: a name may hold dots, or stand there twice. The schema brings the names back.
    numbered = frame.toDF(*map(str, range(len(frame.columns))))
    return numbered.mapInArrow(on_worker, schema)


def _find(frame: DataFrame, column: str) -> tuple[int, bool]:
    """Return a column's place, and whether it holds paths."""
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


def _refuse_twice(there: list[str], new: list[str]) -> None:
    taken = {name.lower() for name in there}  # Spark takes a and A for the same, by default
    for name in new:
        if name.lower() in taken:
            raise RequestError(
                f"the frame has a column {name} already: choose another name, or drop it first"
            )
        taken.add(name.lower())


BYTES = "spark.sql.execution.arrow.maxBytesPerBatch"
ROWS = "spark.sql.execution.arrow.maxRecordsPerBatch"
MOST_ROWS = 500
"""In a batch of photos whose size nothing limits."""


def _check_batches(spark: SparkSession) -> None:
    """Warn if a Spark without `BYTES` (4.0) would put any number of bytes into one batch."""
    with contextlib.suppress(Exception):  # a setting that this Spark doesn't know raises
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
class OnPhotos:
    """What crosses to the workers. Picklable; called there.

    Attributes
    ----------
    work
        From bytes to columns, such as `pomona.extract`.
    place, are_paths
        The column of photos, and whether it holds paths.
    size
        Rows that are looked at at once.
    names
        Of all columns that come out.
    made
        Those that ``work`` makes, as it calls them.
    strict
        Whether a photo that can't be used raises.
    """

    work: Work
    place: int
    are_paths: bool
    size: int
    names: tuple[str, ...]
    made: tuple[str, ...]
    strict: bool = False

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the same rows in the same order, with more columns."""
        if self.are_paths:  # a worker reads the bytes of ``size`` photos at a time
            batches = sliced(batches, self.size)
        photos: Iterator[pa.RecordBatch] = map(self._numbered, batches)
        for rows in self.work(read_uris(photos) if self.are_paths else photos):
            if self.strict:
                self._refuse(rows)
            given = range(len(self.names) - len(self.made))
            columns = [rows[name] for name in (*map(str, given), *self.made)]
            yield pa.RecordBatch.from_arrays(columns, names=self._out())

    def _out(self) -> list[str]:
        """Spark goes by place; but Arrow in Java takes two columns of one name for one."""
        twice = len(set(self.names)) < len(self.names)
        return [str(n) for n in range(len(self.names))] if twice else list(self.names)

    def _numbered(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Call the columns by number, so that none has the name of one that is made."""
        names = [*map(str, range(batch.num_columns)), "path" if self.are_paths else "content"]
        columns = [*batch.columns, batch.column(self.place)]
        return pa.RecordBatch.from_arrays(columns, names=names)

    def _refuse(self, rows: pa.RecordBatch) -> None:
        for n, error in enumerate(rows["error"].to_pylist()):
            if error is not None:
                photo = rows["path"][n].as_py() if self.are_paths else "a photo"
                raise RequestError(f"{photo} can't be used: {error}")
