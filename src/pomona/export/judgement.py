"""Photos that smaller files of a model are calibrated on and judged by, and the judgement."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pomona.backbone.mobilenet import INPUT
from pomona.backbone.session import onnx_session
from pomona.core.errors import RequestError, SourceError
from pomona.core.files import read_json
from pomona.export.equalization import BATCH
from pomona.model.head import ANSWER
from pomona.photos import isolation
from pomona.photos.decoding import Pixels
from pomona.photos.reading import Reader, reader
from pomona.photos.source import open_readable
from pomona.workspace import feature_table
from pomona.workspace.layout import Out

ENOUGH = 100
"""Test photos of known labels that are enough to judge by; with fewer, Training photos are held
out."""

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

    Both are evenly spread over the photos of the model's labels, at most so many. A RequestError
    if there are none.
    """
    rows = feature_table.index(out, out.work / "none", damaged="skip").rows
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
    calibrating = _sample("Training", training.take(pa.array(picked)), labels)
    return calibrating, _sample(split, judges, labels)


def _evenly(count: int, most: int) -> Codes:
    take = min(count, most)
    return np.arange(take, dtype=np.int64) * count // max(1, take)


def _sample(split: str, rows: pa.Table, labels: tuple[str, ...]) -> Sample:
    y = np.array([labels.index(label) for label in rows["label"].to_pylist()], np.int64)
    return Sample(split, rows["path"].to_pylist(), y)


def read_photos(
    out: Out, sample: Sample, size: int, step: Callable[[int], None]
) -> Iterator[tuple[Pixels, Codes]]:
    """Yield pixels, uint8 [m, size, size, 3], and codes [m] of at most `BATCH` photos at a time.

    A photo that can't be read any more is left out. ``step`` gets the number of photos each time.

    Raises
    ------
    RequestError
        If the source is gone, or only Spark can read it, or fewer than half could be read.
    """
    source = str(read_json(out.table_file).get("source"))
    wanted, done = len(sample.paths), 0
    photos = _decoded(_reader(source), sample, size)
    while batch := list(itertools.islice(photos, BATCH)):
        pixels, codes = zip(*batch, strict=True)
        yield np.stack(pixels), np.array(codes, np.int64)
        done += len(batch)
        step(len(batch))
    if done < max(1, wanted / 2):
        raise RequestError(
            f"{wanted - done:,} of {wanted:,} photos can't be read any more: put the photos back "
            f"at {source}, or export without int8 and half"
        )


def _reader(source: str) -> Reader:
    try:
        return reader(open_readable(source))
    except SourceError as error:
        raise RequestError(
            f"export reads photos to calibrate and judge, and can't: {error}; put the photos back "
            f"at {source}, extract from a copy, or export without int8 and half"
        ) from error


def _decoded(read: Reader, sample: Sample, size: int) -> Iterator[tuple[Pixels, int]]:
    for path, code in zip(sample.paths, sample.y, strict=True):
        try:
            pixels = isolation.decode_apart(read(path), size).pixels
        except OSError:
            continue
        if pixels is not None:
            yield pixels, code


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


def run_files(photos: Iterable[tuple[Pixels, Codes]], contents: list[bytes]) -> Answers:
    """Run several files of a model on the same photos, as `read_photos` yields them."""
    sessions = [onnx_session(content) for content in contents]
    parts = []
    for pixels, y in photos:
        outputs = [session.run(list(ANSWER), {INPUT: pixels}) for session in sessions]
        guesses = np.stack([probabilities.argmax(axis=1) for probabilities, _ in outputs])
        parts.append((guesses, np.stack([score for _, score in outputs]), y))
    return Answers(*(np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)))


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
    """Compare a variant's labels with those of float32 and with the true ones, as codes [n].

    ``passed``: the drop is below `MOST_DROP` and the agreement at least `LEAST_AGREEMENT`.
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
