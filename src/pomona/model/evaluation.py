"""What ``metrics.json`` says of a model: on Test, with and without near-copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pomona.model import classifier as cls
from pomona.model import leakage, metrics
from pomona.model.classifier import Codes
from pomona.model.head import Head
from pomona.model.pca_table import Photos, groups_of, new_to, read_photos
from pomona.workspace.layout import Out

LISTED = 1000
"""Near-copies that metrics.json lists."""


def calibration(logits: npt.NDArray[np.float64], temperature: float, y: Codes) -> dict[str, Any]:
    """Return the calibration error before the temperature, and both reliability tables."""
    before, after = cls.softmax(logits), cls.softmax(logits / temperature)
    return {
        "calibration_error_before": metrics.calibration_error(before, y),
        "reliability_before": metrics.reliability(before, y),
        "reliability": metrics.reliability(after, y),
    }


def judge_test(
    out: Out, head: Head, max_rows: int, tuned_on: list[str], *, by_group: bool
) -> tuple[dict[str, Any] | None, dict[str, bool]]:
    """Judge Test. Returns the figures, and for each photo of a known label whether it was right."""
    photos = read_photos(out, "test_pca", max_rows)
    if not len(photos.labels):
        return None, {}
    classifier, detector = head.classifier, head.detector
    place = {label: n for n, label in enumerate(classifier.labels)}
    seen = np.array([label in place for label in photos.labels])
    logits = classifier.logits(photos.z)
    scores = detector.score(photos.z, logits)
    kept = scores >= detector.threshold
    strange = sorted(set(photos.labels[~seen]))
    figures: dict[str, Any] = {
        "photos": int(seen.sum()),
        "photos_in_table": photos.of,
        "labels_never_seen": {"labels": strange, "photos": int((~seen).sum())},
    }
    if strange:
        figures["labels_never_seen"]["called_unknown"] = float((~kept[~seen]).mean())
    if not seen.any():
        return figures, {}
    if strange:
        figures["labels_never_seen"]["auroc"] = metrics.auroc(scores[seen], scores[~seen])
    known = photos.take(seen)
    y = np.array([place[label] for label in known.labels], np.int64)
    units = groups_of(known) if by_group else np.arange(len(y))
    probabilities = cls.softmax(logits[seen])
    figures |= metrics.measure(probabilities, y, units)
    guess = probabilities.argmax(axis=1)
    table = metrics.confusion(guess, y, len(classifier.labels))
    figures |= {
        "by": "group" if by_group else "photo",
        "weights_saw": not new_to(known, tuned_on).all(),
        **calibration(logits[seen] * classifier.temperature, classifier.temperature, y),
        "kept": float(kept[seen].mean()),
        "per_label": metrics.per_label(table, classifier.labels),
        "confusion": table.tolist(),
        "mistakes": _mistakes(known, probabilities, y, classifier.labels),
    }
    return figures, dict(zip(known.paths, (guess == y).tolist(), strict=True))


def _mistakes(
    photos: Photos,
    probabilities: npt.NDArray[np.float64],
    y: Codes,
    labels: tuple[str, ...],
    most: int = 24,
) -> list[dict[str, Any]]:
    """Return the wrong answers that were given with the highest probability."""
    guess, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(guess != y)
    wrong = wrong[np.argsort(-sure[wrong], kind="stable")][:most]
    return [
        {
            "path": str(photos.paths[n]),
            "label": labels[y[n]],
            "predicted": labels[guess[n]],
            "probability": float(sure[n]),
        }
        for n in wrong
    ]


def judge_leakage(
    out: Out, right: dict[str, bool], on_done: Callable[[], None]
) -> dict[str, Any] | None:
    """Count near-copies between the splits, and give the accuracy with and without them."""
    if not right:
        return None
    found = leakage.near_copies(out, lambda: None)
    on_done()
    pairs = found["pairs"]
    copies = {pair["path"] for pair in pairs}
    looked = [path for path in found["looked_at"] if path in right]
    rest = [right[path] for path in looked if path not in copies]
    return {
        "cosine": found["cosine"],
        "looked_at": len(looked),
        "of": len(right),
        "near_copies": len(copies & set(looked)),
        "accuracy_with": float(np.mean([right[path] for path in looked])) if looked else None,
        "accuracy_without": float(np.mean(rest)) if rest else None,
        "pairs": pairs[:LISTED],
    }


def headline(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the few figures that stand for all: by split of the data, value and interval."""
    names = ("accuracy", "macro_f1", f"top_{metrics.TOP}", "calibration_error")
    found = {}
    for part in ("cross_validation", "test"):
        rows = figures.get(part) or {}
        if "accuracy" in rows:
            found[part] = {name: rows[name] for name in (*names, "photos", "units", "by")}
            if rows.get("weights_saw"):
                found[part]["weights_saw"] = True
    return found
