"""Figures about predictions, the main ones with intervals. No files.

Needs scikit-learn (extra ``train``), which is imported where it is called: `unknown`, and with it
all that applies a model, imports this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pomona.model.sampling import Array, Codes, Flags

BINS = 15
"""Of the expected calibration error, as in Guo et al. 2017."""
DRAWS = 1000
TOP = 3


def measure(probabilities: Array, y: Codes, units: Codes, draws: int = DRAWS) -> dict[str, Any]:
    """Return accuracy, macro F1, top-3 accuracy and calibration error with 95 % intervals.

    Parameters
    ----------
    probabilities, y
        float [n, labels] and codes [n], n > 0.
    units
        Code [n] of what is drawn in the percentile bootstrap: the photo, or its group, since photos
        of one group are near-copies and tell little more than one of them.

    Returns
    -------
    dict
        ``photos``, ``units``, and for each metric ``value``, ``low``, ``high``.
    """
    guess, best = probabilities.argmax(axis=1), probabilities.max(axis=1)
    right = guess == y
    own = probabilities[np.arange(len(y)), y]
    in_top = (probabilities > own[:, None]).sum(axis=1) < TOP
    labels = probabilities.shape[1]
    cells = y * labels + guess
    bins = _bins(best)
    present = np.union1d(y, guess)

    def figures(weight: Array) -> tuple[float, ...]:
        total = weight.sum()
        table = np.bincount(cells, weight, labels * labels).reshape(labels, labels)
        gap = np.bincount(bins, weight * (right - best), BINS)
        return (
            float(weight @ right / total),
            float(f1(table)[present].mean()),
            float(weight @ in_top / total),
            float(np.abs(gap).sum() / total),
        )

    names = ("accuracy", "macro_f1", f"top_{TOP}", "calibration_error")
    return {
        "photos": len(y),
        "units": len(np.unique(units)),
        **dict(zip(names, _with_intervals(figures, units, draws), strict=True)),
    }


def _with_intervals(
    figures: Callable[[Array], tuple[float, ...]], units: Codes, draws: int
) -> list[dict[str, float]]:
    _, unit = np.unique(units, return_inverse=True)
    count = int(unit.max()) + 1
    rng = np.random.default_rng(0)
    drawn = np.array(
        [
            figures(np.bincount(rng.integers(0, count, count), minlength=count)[unit].astype(float))
            for _ in range(draws)
        ]
    )
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    values = figures(np.ones(len(unit)))
    return [
        {"value": value, "low": float(a), "high": float(b)}
        for value, a, b in zip(values, low, high, strict=True)
    ]


def f1(table: npt.NDArray[Any]) -> Array:
    """Return F1 [labels] of a confusion matrix; 0 where nothing was right."""
    hits = np.diagonal(table).astype(np.float64)
    both = table.sum(axis=0) + table.sum(axis=1)
    return np.asarray(2 * hits / np.where(both, both, 1))


def per_label(guess: Codes, y: Codes, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return number of photos, precision, recall and F1 of each label; None for 0/0."""
    from sklearn.metrics import precision_recall_fscore_support

    *ratios, photos = precision_recall_fscore_support(
        y, guess, labels=np.arange(len(labels)), zero_division=np.nan
    )
    precision, recall, f1s = ([None if np.isnan(r) else float(r) for r in row] for row in ratios)
    return [
        {"label": label, "photos": int(count), "precision": p, "recall": r, "f1": f}
        for label, count, p, r, f in zip(labels, photos, precision, recall, f1s, strict=True)
    ]


def _bins(confidence: Array) -> Codes:
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def reliability(probabilities: Array, y: Codes) -> list[dict[str, float]]:
    """Return for each bin of confidence that has photos: ``photos``, ``confidence``, ``accuracy``.

    ``confidence`` is the mean of the highest probabilities in it; the bins are of equal width.
    """
    best = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == y
    bins = _bins(best)
    return [
        {
            "photos": int((bins == n).sum()),
            "confidence": float(best[bins == n].mean()),
            "accuracy": float(right[bins == n].mean()),
        }
        for n in np.unique(bins)
    ]


def calibration_error(probabilities: Array, y: Codes) -> float:
    """Return the expected calibration error (Guo et al. 2017) over `BINS` bins of equal width."""
    rows = reliability(probabilities, y)
    return sum(r["photos"] * abs(r["confidence"] - r["accuracy"]) for r in rows) / max(1, len(y))


def auroc(known: Array, unknown: Array) -> float:
    """Return the chance that a known photo scores above an unknown one (ties count half)."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([known, unknown]))[: len(known)]
    pairs = len(known) * len(unknown)
    return float((ranks.sum() - len(known) * (len(known) + 1) / 2) / pairs)


def paired_test(new: Flags, old: Flags, units: Codes, draws: int = 20_000) -> float:
    """Return the one-sided p-value of "new is right no more often than old" on the same photos.

    A paired permutation test (Fisher): the differences of whole units change sign at random. With
    one photo a unit it is McNemar's test.
    """
    _, unit = np.unique(units, return_inverse=True)
    differences = np.bincount(unit, new.astype(float) - old.astype(float))
    differences = differences[differences != 0]
    observed = differences.sum()
    rng = np.random.default_rng(0)
    above = 0
    block = max(1, 1_000_000 // max(1, len(differences)))  # draws at a time
    for start in range(0, draws, block):
        signs = rng.integers(0, 2, (min(block, draws - start), len(differences))) * 2 - 1
        above += int((signs @ differences >= observed - 1e-9).sum())
    return (above + 1) / (draws + 1)
