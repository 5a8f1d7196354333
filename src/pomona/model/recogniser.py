"""From a photo to an answer: run a model and read its outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pomona.backbone.extract import extract_photos
from pomona.backbone.spec import BackboneSpec
from pomona.core.cpus import available_cpus
from pomona.core.errors import RequestError
from pomona.model.artifact import Model

ANSWERS = pa.schema(
    [
        ("label", pa.string()),  # null: unknown, or the photo can't be used
        ("probability", pa.float32()),  # of the most probable label, also of an unknown photo
        ("unknown", pa.bool_()),  # null where the photo can't be used
        ("reason", pa.string()),  # why it is unknown, else null
        ("score", pa.float32()),  # below the model's threshold: unknown
        ("nearest", pa.list_(pa.string())),  # the most probable labels, best first
        ("probabilities", pa.list_(pa.float32())),  # theirs
        ("error", pa.string()),  # one of pomona.core.schema.ERRORS, or null
    ]
)
"""What `predict` adds to each photo."""


@dataclass(frozen=True)
class Recogniser:
    """What workers need to answer: the network to run, and how to read its outputs. Picklable."""

    spec: BackboneSpec
    labels: tuple[str, ...]
    threshold: float
    method: str
    top: int = 3


def make_recogniser(model: Model, top: int = 3, **options: Any) -> Recogniser:
    """Make a recogniser; ``options`` are those of `Model.spec`."""
    if top < 1:
        raise RequestError(f"--top is at least 1, not {top}")
    about = model.about["unknown"]
    threshold, method = float(about["threshold"]), str(about["method"])
    top = min(top, len(model.labels))
    return Recogniser(model.spec(**options), model.labels, threshold, method, top)


def with_threads(recogniser: Recogniser, threads: int) -> Recogniser:
    """Return the recogniser with another number of CPU threads."""
    return replace(recogniser, spec=replace(recogniser.spec, threads=threads))


def for_driver(recogniser: Recogniser) -> Recogniser:
    """Return the recogniser for this process alone: all its CPUs, decoding in children.

    A task of an engine that dies is tried again; here nobody else would go on.
    """
    spec = replace(recogniser.spec, threads=available_cpus(), guard="child")
    return replace(recogniser, spec=spec)


def recognise(
    batches: Iterator[pa.RecordBatch], recogniser: Recogniser
) -> Iterator[pa.RecordBatch]:
    """Answer for photos, in batches as `pomona.extract` takes them. Runs on workers.

    Yields a batch for each that came in: its columns less ``content``, then `ANSWERS`.
    """
    for batch in batches:
        rows = answer_photos(batch["content"].to_pylist(), recogniser)
        kept = batch.drop_columns(["content"])
        columns = [pa.array([row[field.name] for row in rows], field.type) for field in ANSWERS]
        yield pa.RecordBatch.from_arrays(
            [*kept.columns, *columns], schema=pa.schema([*kept.schema, *ANSWERS])
        )


def answer_photos(contents: Sequence[bytes | None], recogniser: Recogniser) -> list[dict[str, Any]]:
    """Answer for photos' bytes without Arrow: one row each, as `ANSWERS`. Runs on workers."""
    photos = extract_photos(contents, recogniser.spec)
    pairs = zip(photos.by_photo("probabilities"), photos.by_photo("score"), strict=True)
    rows = [answer(p, None if s is None else float(s), recogniser) for p, s in pairs]
    return [{**row, "error": error} for row, error in zip(rows, photos.errors, strict=True)]


def answer(
    probabilities: npt.NDArray[np.float32] | None, score: float | None, recogniser: Recogniser
) -> dict[str, Any]:
    """Return one photo's answer, as `ANSWERS`; all null for a photo that can't be used."""
    if probabilities is None or score is None:
        return dict.fromkeys(ANSWERS.names)
    order = np.argsort(-probabilities, kind="stable")[: recogniser.top]
    nearest = [recogniser.labels[n] for n in order]
    unknown = score < recogniser.threshold
    return {
        "label": None if unknown else nearest[0],
        "probability": float(probabilities[order[0]]),
        "unknown": unknown,
        "reason": why(recogniser.method) if unknown else None,
        "score": score,
        "nearest": nearest,
        "probabilities": [float(probabilities[n]) for n in order],
        "error": None,
    }


def to_json(row: dict[str, Any], top: int | None = None) -> dict[str, Any]:
    """Return a row of `ANSWERS` as `pomona predict --json` and the service give it.

    ``nearest`` becomes a list of at most ``top`` labels with their probabilities; numbers have six
    decimals. Other columns of the row stay as they are.
    """
    pairs = zip(row["nearest"] or (), row["probabilities"] or (), strict=True)
    nearest = [{"label": label, "probability": round(p, 6)} for label, p in pairs]
    answer = {name: value for name, value in row.items() if name != "probabilities"}
    for name in ("probability", "score"):
        answer[name] = None if row[name] is None else round(row[name], 6)
    return {**answer, "nearest": nearest[:top]}


def why(method: str) -> str:
    """Return the reason for "unknown" that goes with a detector's method."""
    return {
        "max_probability": "no label is probable enough",
        "energy": "no label gets enough evidence",
        "distance": "too far from every kind of photo that the model was trained on",
        "neighbours": "too far from the nearest photo that the model was trained on",
    }[method]
