"""Choose the photos that smaller files are calibrated on and judged by, and read them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pomona.core.errors import RequestError, SourceError
from pomona.core.files import read_json
from pomona.export.activations import Pixels
from pomona.photos import decoding
from pomona.photos.reading import Reader, reader
from pomona.photos.source import open_source
from pomona.workspace import feature_table
from pomona.workspace.layout import Out

ENOUGH = 100
"""Test photos of known labels that are enough to judge by; with fewer, Training photos are held
out."""
READ_AT_ONCE = 64

Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """Photos of one split: their paths, and the codes of their labels, [n]."""

    split: str
    paths: list[str]
    y: Codes


def choose(
    out: Out, labels: tuple[str, ...], calibration: int, held_out: int
) -> tuple[Sample, Sample]:
    """Choose photos to calibrate on (Training) and photos to judge by, no photo in both.

    Parameters
    ----------
    labels
        The model's; photos of others are left out.
    calibration, held_out
        How many photos at most, evenly spread over those that there are.

    Raises
    ------
    RequestError
        If there are none of known labels.
    """
    rows = feature_table.index(out, out.work / "none", look_only=True).rows
    known = pc.is_in(rows["label"], pa.array(labels))
    rows = rows.filter(pc.and_(known, pc.is_null(rows["error"])))
    rows = rows.select(["path", "split", "label"]).sort_by("path")
    training = rows.filter(pc.equal(rows["split"], "Training"))
    test = rows.filter(pc.equal(rows["split"], "Test"))
    # At most half of a small Training: the other half may have to judge.
    take = min(calibration, max(1, training.num_rows // 2))
    picked = _evenly(training.num_rows, take)
    rest = np.setdiff1d(np.arange(training.num_rows), picked)
    judges = test if test.num_rows >= ENOUGH else training.take(pa.array(rest))
    judges = judges.take(pa.array(_evenly(judges.num_rows, held_out)))
    if not len(picked) or not judges.num_rows:
        raise RequestError(
            f"there are too few photos of the model's labels in {out.root}: train again on it"
        )
    split = "Test" if test.num_rows >= ENOUGH else "Training"
    return _sample("Training", training.take(pa.array(picked)), labels), _sample(
        split, judges, labels
    )


def _evenly(count: int, most: int) -> Codes:
    take = min(count, most)
    return np.arange(take, dtype=np.int64) * count // max(1, take)


def _sample(split: str, rows: pa.Table, labels: tuple[str, ...]) -> Sample:
    place = {label: n for n, label in enumerate(labels)}
    y = np.array([place[label] for label in rows["label"].to_pylist()], np.int64)
    return Sample(split, rows["path"].to_pylist(), y)


def photo_reader(out: Out) -> Reader:
    """Return what reads the photos of OUT's source.

    Raises
    ------
    RequestError
        If the source is gone, or only Spark can read it.
    """
    name = str(read_json(out.table_file).get("source"))
    try:
        source = open_source(name)
    except SourceError as error:
        raise RequestError(
            f"export reads photos to calibrate and judge, and their folder is gone: put the photos "
            f"back at {name}, or export without int8 and half"
        ) from error
    if source.kind == "hadoop":
        raise RequestError(
            f"export can't read photos from {name}: export without int8 and half, or extract from "
            "a copy in a local folder, s3:// or gs://"
        )
    return reader(source)


def read_photos(read: Reader, sample: Sample, size: int) -> Iterator[tuple[Pixels, Codes]]:
    """Yield pixels, uint8 [m, size, size, 3], and codes [m] of a few photos at a time.

    A photo that can't be read any more is left out.
    """
    for start in range(0, len(sample.paths), READ_AT_ONCE):
        pixels, kept = [], []
        for number in range(start, min(start + READ_AT_ONCE, len(sample.paths))):
            with contextlib.suppress(OSError):
                photo = decoding.decode(read(sample.paths[number]), size)
                if photo.pixels is not None:
                    pixels.append(photo.pixels)
                    kept.append(number)
        none = np.zeros((0, size, size, 3), np.uint8)
        yield np.stack(pixels) if pixels else none, sample.y[kept]


def refuse_few(read: int, wanted: int, out: Out) -> None:
    """Raise a RequestError if fewer than half of the photos could be read."""
    if read < max(1, wanted / 2):
        where = read_json(out.table_file).get("source")
        raise RequestError(
            f"{wanted - read:,} of {wanted:,} photos can't be read any more: put the photos back "
            f"at {where}, or export without int8 and half"
        )
