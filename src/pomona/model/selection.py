"""Model selection: C, temperature and detector, chosen on held-out Training photos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pomona.model import classifier as cls
from pomona.model import metrics, unknown
from pomona.model.classifier import Classifier, Settings, Trial
from pomona.model.evaluation import calibration
from pomona.model.sampling import Fold, Sample, folds, judged
from pomona.model.unknown import Detector

SEARCH_ROWS = 50_000
"""Rows on which C is chosen and calibration is done: more change neither, and cost hours."""
FEWEST_UNSEEN = 40
"""Photos, of two labels, that tuned weights never saw: on fewer nothing can be chosen."""

OnDone = Callable[[], None]


def select_and_fit(
    everything: Sample, class_weight: str, method: str, keep: float, on_done: OnDone
) -> tuple[Classifier, Detector, dict[str, Any]]:
    """Choose C, temperature and detector on held-out photos, then fit on all of them.

    Parameters
    ----------
    method
        One of `pomona.model.unknown.METHODS`, or ``auto``: the one with the highest AUROC.
    keep
        Share of known photos that the threshold calls known.
    on_done
        Called after each strength tried and each round of leaving labels out.

    Returns
    -------
    tuple
        Classifier, detector, and the figures for metrics.json.
    """
    figures: dict[str, Any] = {"search": [], "cross_validation": None, "class_weight": class_weight}
    settings = Settings(class_weight)
    sample = everything.at_most(SEARCH_ROWS)
    splits, weights_saw = choose_folds(sample)
    if splits:
        best, figures["search"] = choose_strength(sample, splits, class_weight, on_done)
        temperature, figures["cross_validation"] = calibrate(sample, best, splits, weights_saw)
        settings = replace(settings, strength=best.strength, temperature=temperature)
    method, threshold, comparison = choose_detector(
        sample, splits, weights_saw, settings, method, keep, on_done
    )
    fitted = cls.fit(everything.z, everything.y, everything.labels, settings.strength, class_weight)
    detector = unknown.make(method, everything.z, everything.kinds)
    figures |= {
        "strength": settings.strength,
        "temperature": settings.temperature,
        "unknown": {
            "method": method,
            "threshold": threshold,
            "keep": keep,
            "weights_saw": sample.tuned,
            **comparison,
        },
    }
    classifier = replace(fitted, temperature=settings.temperature)
    return classifier, replace(detector, threshold=threshold), figures


def choose_folds(sample: Sample) -> tuple[list[Fold], bool]:
    """Return folds that judge only photos that the weights never saw: those say how new ones fare.

    Where there are too few such photos to choose anything on, all are judged; then the second value
    is True.
    """
    every = folds(sample.y, sample.groups)
    unseen = sample.unseen
    if unseen is None or unseen.all():
        return every, False
    fresh = [(to_fit, to_judge[unseen[to_judge]]) for to_fit, to_judge in every]
    fresh = [fold for fold in fresh if len(fold[1])]
    rows = [row for fold in fresh for row in judged(sample.y, fold)]
    enough = len(rows) >= FEWEST_UNSEEN and len(np.unique(sample.y[rows])) > 1
    return (fresh, False) if enough else (every, True)


def choose_strength(
    sample: Sample, splits: list[Fold], class_weight: str, on_done: OnDone
) -> tuple[Trial, list[dict[str, float]]]:
    """Return the trial with the highest accuracy, and the accuracy of each strength.

    Of equally accurate trials it is the most regularised one.
    """
    best: Trial | None = None
    accuracies = []
    for strength in cls.STRENGTHS:
        trial = cls.trial(sample, splits, strength, class_weight)
        on_done()
        accuracies.append({"strength": strength, "accuracy": trial.accuracy})
        if best is None or trial.accuracy > best.accuracy:
            best = trial
    assert best is not None
    return best, accuracies


def calibrate(
    sample: Sample, best: Trial, splits: list[Fold], weights_saw: bool
) -> tuple[float, dict[str, Any]]:
    """Return the temperature, and the figures of cross-validation with it."""
    y = sample.y[best.rows]
    temperature = cls.temperature(best.logits, y)
    judgeable = len(sample.y) if weights_saw or sample.unseen is None else int(sample.unseen.sum())
    units = best.rows if sample.groups is None else sample.groups[best.rows]
    return temperature, {
        "by": "photo" if sample.groups is None else "group",
        "folds": len(splits),
        "not_judged": judgeable - len(best.rows),
        "weights_saw": weights_saw,
        **metrics.measure(cls.softmax(best.logits / temperature), y, units),
        **calibration(best.logits, temperature, y),
    }


def choose_detector(
    sample: Sample,
    splits: list[Fold],
    weights_saw: bool,
    settings: Settings,
    method: str,
    keep: float,
    on_done: OnDone,
) -> tuple[str, float, dict[str, Any]]:
    """Return the method, its threshold, and how the methods compare.

    Weights that were tuned on a group bring its photos together, far from all others: held-out
    groups would put the threshold where nothing is unknown (docs/log.md). So where the weights saw
    the photos that are judged, these are held out one by one, and ``auto`` is the default method.
    """
    comparison = unknown.compare(sample, settings, on_done)
    if method == "auto":
        areas: dict[str, float] = comparison.get("auroc", {})
        trusted = areas and not weights_saw
        method = max(areas, key=lambda name: areas[name]) if trusted else unknown.DEFAULT
    if weights_saw:
        splits = folds(sample.y, None)
    scores = unknown.held_out(method, sample, splits, settings)
    if not len(scores):  # nothing could be held out: then nothing is called unknown
        return method, float(np.finfo(np.float32).min), comparison
    return method, unknown.threshold(scores, keep), comparison
