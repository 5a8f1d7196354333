"""What ``metrics.json`` says of a model: on Test, with and without near-copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pomona.model import leakage, metrics
from pomona.model.classifier import softmax
from pomona.model.head import Head
from pomona.model.pca_table import Photos, groups_of, read_photos, unseen_by
from pomona.model.sampling import Array, Codes
from pomona.workspace.layout import Out

MISTAKES, NEAR_COPIES = 24, 1000
"""How many metrics.json lists."""


def calibration(logits: Array, temperature: float, y: Codes) -> dict[str, Any]:
    """Return the calibration error before the temperature, and both reliability tables."""
    before, after = softmax(logits), softmax(logits / temperature)
    return {
        "calibration_error_before": metrics.calibration_error(before, y),
        "reliability_before": metrics.reliability(before, y),
        "reliability": metrics.reliability(after, y),
    }


def judge_test(
    out: Out, head: Head, max_rows: int, tuned_on: list[str], *, by_group: bool
) -> tuple[dict[str, Any] | None, dict[str, bool]]:
    """Return the figures on Test, and by path whether a photo of a known label was named right."""
    from sklearn.metrics import confusion_matrix

    photos = read_photos(out, "test_pca", max_rows)
    if not len(photos.labels):
        return None, {}
    classifier, detector = head.classifier, head.detector
    codes = {label: n for n, label in enumerate(classifier.labels)}
    seen = np.array([label in codes for label in photos.labels])
    logits = classifier.logits(photos.z)
    scores = detector.score(photos.z, logits)
    kept = scores >= detector.threshold
    never_seen: dict[str, Any] = {
        "labels": sorted(set(photos.labels[~seen])),
        "photos": int((~seen).sum()),
    }
    if not seen.all():
        never_seen["called_unknown"] = float((~kept[~seen]).mean())
    figures: dict[str, Any] = {
        "photos": int(seen.sum()),
        "photos_in_table": photos.of,
        "labels_never_seen": never_seen,
    }
    if not seen.any():
        return figures, {}
    if not seen.all():
        never_seen["auroc"] = metrics.auroc(scores[seen], scores[~seen])
    known = photos.take(seen)
    y = np.array([codes[label] for label in known.labels], np.int64)
    units = groups_of(known) if by_group else np.arange(len(y))
    probabilities = softmax(logits[seen])
    guess = probabilities.argmax(axis=1)
    figures |= metrics.measure(probabilities, y, units)
    figures |= {
        "by": "group" if by_group else "photo",
        "weights_saw": not unseen_by(known, tuned_on).all(),
        **calibration(logits[seen] * classifier.temperature, classifier.temperature, y),
        "kept": float(kept[seen].mean()),
        "per_label": metrics.per_label(guess, y, classifier.labels),
        "confusion": confusion_matrix(y, guess, labels=range(len(codes))).tolist(),
        "mistakes": _mistakes(known, probabilities, y, classifier.labels),
    }
    return figures, dict(zip(known.paths, (guess == y).tolist(), strict=True))


def _mistakes(
    photos: Photos, probabilities: Array, y: Codes, labels: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Return the wrong answers that were given with the highest probability."""
    guess, best = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(guess != y)
    wrong = wrong[np.argsort(-best[wrong], kind="stable")][:MISTAKES]
    return [
        {
            "path": str(photos.paths[n]),
            "label": labels[y[n]],
            "predicted": labels[guess[n]],
            "probability": float(best[n]),
        }
        for n in wrong
    ]


def judge_leakage(
    out: Out, right: dict[str, bool], on_done: Callable[[], None]
) -> dict[str, Any] | None:
    """Count near-copies between the splits, and give the accuracy with and without them."""
    if not right:
        return None
    nearest = leakage.near_copies(out)
    on_done()
    copies = {pair["path"] for pair in nearest["pairs"]}
    looked_at = [path for path in nearest["looked_at"] if path in right]
    rest = [right[path] for path in looked_at if path not in copies]
    return {
        "cosine": nearest["cosine"],
        "looked_at": len(looked_at),
        "of": len(right),
        "near_copies": len(copies & set(looked_at)),
        "accuracy_with": float(np.mean([right[path] for path in looked_at])) if looked_at else None,
        "accuracy_without": float(np.mean(rest)) if rest else None,
        "pairs": nearest["pairs"][:NEAR_COPIES],
    }


def headline(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the main figures with their intervals, by how they were measured."""
    names = ("accuracy", "macro_f1", f"top_{metrics.TOP}", "calibration_error")
    main: dict[str, Any] = {}
    for part in ("cross_validation", "test"):
        rows = figures.get(part) or {}
        if "accuracy" in rows:
            main[part] = {name: rows[name] for name in (*names, "photos", "units", "by")}
            if rows.get("weights_saw"):
                main[part]["weights_saw"] = True
    return main
