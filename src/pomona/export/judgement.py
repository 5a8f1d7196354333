"""Photos that smaller files of a model are calibrated on and judged by, and the judgement."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pomona.backbone.session import onnx_session
from pomona.core.errors import RequestError, SourceError
from pomona.core.files import read_json
from pomona.export.activations import Pixels, batches
from pomona.model.head import ANSWER
from pomona.photos import decoding
from pomona.photos.reading import Reader, reader
from pomona.photos.source import open_readable
from pomona.workspace import feature_table
from pomona.workspace.layout import Out

ENOUGH = 100
"""Test photos of known labels that are enough to judge by; with fewer, Training photos are held
out."""
READ_AT_ONCE = 64

MOST_DROP = 0.5
"""A variant is kept if its accuracy drops by less, in percentage points …"""
LEAST_AGREEMENT = 0.99
"""… and if at least this share of its labels are those of float32."""

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
        return reader(open_readable(name))
    except SourceError as error:
        raise RequestError(
            f"export reads photos to calibrate and judge, and can't: {error}; put the photos back "
            f"at {name}, extract from a copy, or export without int8 and half"
        ) from error


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


# --- the judgement -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A file that may be written."""

    kind: str  # half, int8
    name: str
    file: str
    content: bytes


@dataclass(frozen=True)
class Answers:
    """Of several files on the same n photos: labels' codes, scores, and the true codes."""

    guesses: Codes  # [files, n]
    scores: npt.NDArray[np.float32]  # [files, n]
    y: Codes  # [n]


def run_files(
    read: Reader, judges: Sample, size: int, contents: list[bytes], step: Callable[[int], None]
) -> Answers:
    """Run several files of a model on the same photos; ``step`` gets the photos done each time."""
    sessions = [onnx_session(content) for content in contents]
    guesses: list[list[Codes]] = []
    scores: list[list[npt.NDArray[np.float32]]] = []
    codes: list[Codes] = []
    for pixels, y in read_photos(read, judges, size):
        for batch in batches(pixels):
            outputs = [session.run(list(ANSWER), batch) for session in sessions]
            guesses.append([probabilities.argmax(axis=1) for probabilities, _ in outputs])
            scores.append([score for _, score in outputs])
        codes.append(y)
        step(len(y))
    if not guesses:
        return Answers(np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32), codes[0])
    return Answers(
        np.concatenate([np.stack(part) for part in guesses], axis=1),
        np.concatenate([np.stack(part) for part in scores], axis=1),
        np.concatenate(codes),
    )


def judge_all(variants: list[Variant], answers: Answers, threshold: float) -> list[dict[str, Any]]:
    """Judge variants by the answers of the float32 file (first) and theirs, in this order.

    Of several variants of one kind that pass, the one that agrees most is kept.
    """
    rows = []
    unknown = answers.scores < threshold
    for number, variant in enumerate(variants, 1):
        figures = judge(answers.guesses[0], answers.guesses[number], answers.y)
        rows.append(
            {
                "kind": variant.kind,
                "name": variant.name,
                "file": variant.file,
                "bytes": len(variant.content),
                **figures,
                "unknown_agreement": float((unknown[0] == unknown[number]).mean()),
                "kept": False,
            }
        )
    for kind in {row["kind"] for row in rows}:
        passed = [row for row in rows if row["kind"] == kind and row["passed"]]
        if passed:
            max(passed, key=lambda row: float(row["agreement"]))["kept"] = True
    return rows


def refusal(kind: str, about: dict[str, Any]) -> str | None:
    """Return why no variant of a kind was kept, or None. ``about`` is ``export.json``'s content."""
    rows = [row for row in about.get("variants", ()) if row["kind"] == kind]
    if not rows or any(row["kept"] for row in rows):
        return None
    photos = about["held_out"]["photos"]
    return (
        f"{kind} is refused: on {photos:,} held-out photos a drop below {MOST_DROP:g} points and "
        f"agreement of at least {LEAST_AGREEMENT:.0%} are asked for, and there is "
        + "; ".join(
            f"{row['name']}: accuracy {row['accuracy']:.2%} against {row['accuracy_float32']:.2%} "
            f"(drop {row['drop_points']:.2f} points), labels agree on {row['agreement']:.2%}"
            for row in rows
        )
    )


def judge(reference: Codes, guess: Codes, y: Codes) -> dict[str, Any]:
    """Compare a variant's labels with those of float32 and with the true ones, as codes [n], n > 0.

    Returns
    -------
    dict
        ``accuracy_float32``, ``accuracy``, ``drop_points``, ``agreement``, and ``passed``: the
        drop is below `MOST_DROP` and the agreement at least `LEAST_AGREEMENT`.
    """
    before, after = float((reference == y).mean()), float((guess == y).mean())
    drop = 100 * (before - after)
    agreement = float((reference == guess).mean())
    return {
        "accuracy_float32": before,
        "accuracy": after,
        "drop_points": drop,
        "agreement": agreement,
        "passed": drop < MOST_DROP and agreement >= LEAST_AGREEMENT,
    }
