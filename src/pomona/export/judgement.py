"""Judge whether smaller files of a model answer like float32 on held-out photos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pomona.backbone.session import onnx_session
from pomona.export.activations import batches
from pomona.export.sampling import Codes, Sample, read_photos
from pomona.model.head import ANSWER
from pomona.photos.reading import Reader

MOST_DROP = 0.5
"""A variant is kept if its accuracy drops by less, in percentage points …"""
LEAST_AGREEMENT = 0.99
"""… and if at least this share of its labels are those of float32."""


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
