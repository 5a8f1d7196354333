"""Scores that tell photos of known labels from photos of something else. NumPy to apply.

All scores are higher for photos that look known. Which one is best depends on the data, so
`compare` leaves whole labels out and looks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pomona.model.classifier import Array, Codes, Fold, Rows, fit, judged, softmax
from pomona.model.metrics import auroc

METHODS = ("max_probability", "energy", "distance", "neighbours")
REFERENCES = 2000
"""Photos that ``neighbours`` keeps, evenly of all kinds: 400 kB with 50 components."""
LEFT_OUT = 5
"""Rounds of leaving labels out."""
DEFAULT = "distance"
"""Where there are too few labels to compare."""


@dataclass(frozen=True)
class Detector:
    """A score and the threshold below which a photo is unknown.

    Attributes
    ----------
    method
        One of `METHODS`.
    tensors
        For ``distance`` and ``neighbours``: ``whitening`` [k, k], which makes the scatter within
        kinds a unit ball, and ``centres`` [m, k], whitened.
    threshold
        A photo with a lower score is unknown.
    """

    method: str
    tensors: dict[str, Array] = field(default_factory=dict)
    threshold: float = -np.inf

    def score(self, z: Rows, logits: Array) -> Array:
        """Return float64 [n].

        Parameters
        ----------
        z, logits
            pca_features [n, k]; logits [n, labels] divided by the temperature.
        """
        return _SCORES[self.method](z.astype(np.float64), logits, self.tensors)


def _max_probability(z: Array, logits: Array, _: dict[str, Array]) -> Array:
    """Return the highest probability (Hendrycks and Gimpel 2017)."""
    return np.asarray(softmax(logits).max(axis=1))


def _energy(z: Array, logits: Array, _: dict[str, Array]) -> Array:
    """Return the negative free energy, log Σ exp(logits) (Liu et al. 2020)."""
    top = logits.max(axis=1)
    return np.asarray(top + np.log(np.exp(logits - top[:, None]).sum(axis=1)))


def _nearest(z: Array, _: Array, tensors: dict[str, Array]) -> Array:
    """Return minus the squared Mahalanobis distance to the nearest centre.

    The centres are the means of the kinds (Lee et al. 2018), or photos (after Sun et al. 2022,
    whose cosine accepts photos that show something else altogether; see docs/log.md).
    """
    white, centres = z @ tensors["whitening"], tensors["centres"]
    squares = (white**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1) - 2 * white @ centres.T
    return np.asarray(-squares.min(axis=1))


_SCORES: dict[str, Callable[[Array, Array, dict[str, Array]], Array]] = {
    "max_probability": _max_probability,
    "energy": _energy,
    "distance": _nearest,
    "neighbours": _nearest,
}


def make(method: str, z: Rows, kinds: Codes) -> Detector:
    """Fit a detector on known photos.

    Parameters
    ----------
    z
        float [n, k].
    kinds
        Code [n] of what a centre stands for: the label, or the group where there are groups.
    """
    if method in ("max_probability", "energy"):
        return Detector(method)
    rows = z.astype(np.float64)
    means, whitening = _within(rows, kinds)
    centres = means if method == "distance" else rows[_references(kinds)]
    return Detector(method, {"whitening": whitening, "centres": centres @ whitening})


def _within(z: Array, kinds: Codes) -> tuple[Array, Array]:
    """Return the means of the kinds [m, k], and W [k, k] that whitens what differs within them."""
    from sklearn.covariance import ledoit_wolf

    _, codes = np.unique(kinds, return_inverse=True)
    counts = np.bincount(codes)
    means = np.stack([np.bincount(codes, column) / counts for column in z.T], axis=1)
    within, _ = ledoit_wolf(z - means[codes], assume_centered=True)
    values, vectors = np.linalg.eigh(within)
    most = values[-1] if values[-1] > 0 else 1.0  # one photo of each kind: nothing differs within
    return means, vectors / np.sqrt(np.maximum(values, most * 1e-6))


def _references(kinds: Codes) -> Codes:
    """Choose up to `REFERENCES` rows, of each kind as many as there is room for, at least one."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(kinds))
    order = order[np.argsort(kinds[order], kind="stable")]
    _, starts, counts = np.unique(kinds[order], return_index=True, return_counts=True)
    turn = np.arange(len(order)) - np.repeat(starts, counts)  # the how-manieth of its kind
    most = max(REFERENCES, len(starts))
    return np.sort(order[np.argsort(turn, kind="stable")][:most])


def threshold(scores: Array, keep: float) -> float:
    """Return the score that the given share of known photos reaches."""
    return float(np.quantile(scores, 1 - keep)) if len(scores) else -np.inf


# --- held-out scores ---------------------------------------------------------------------------

Sample = tuple[Rows, Codes, Codes]
"""(z, y, kinds) of the same rows."""


def held_out(
    method: str, rows: Sample, cut: list[Fold], labels: tuple[str, ...], **how: Any
) -> Array:
    """Return the scores of judged rows, each from a detector that didn't see it.

    Parameters
    ----------
    how
        ``strength``, ``class_weight`` of `fit`, and ``temperature``.
    """
    found = []
    for fold in cut:
        held = judged(rows[1], fold)
        if len(held):
            found.append(_scores(rows, fold[0], [held], labels, (method,), **how)[method][0])
    return np.concatenate(found) if found else np.zeros(0)


def compare(
    rows: Sample,
    groups: Codes | None,
    labels: tuple[str, ...],
    on_done: Callable[[], None],
    **how: Any,
) -> dict[str, Any]:
    """Leave whole labels out and see which score tells their photos from held-out known ones.

    Returns
    -------
    dict
        ``auroc`` by method, mean over the rounds, and ``rounds`` (the labels left out in each);
        empty where there are fewer than three labels.
    """
    from pomona.model.classifier import folds

    y = rows[1]
    rounds: list[list[str]] = []
    areas: dict[str, list[float]] = {method: [] for method in METHODS}
    for gone in left_out(y):
        on_done()
        stay = np.flatnonzero(~np.isin(y, gone))
        cut = folds(y[stay], None if groups is None else groups[stay])
        if not cut or not len(known := judged(y[stay], cut[0])):
            continue
        fitted, known = stay[cut[0][0]], stay[known]
        away = np.flatnonzero(np.isin(y, gone))
        found = _scores(rows, fitted, [known, away], labels, METHODS, **how)
        for method, (inside, outside) in found.items():
            areas[method].append(auroc(inside, outside))
        rounds.append([labels[code] for code in gone])
    if not rounds:
        return {}
    means = {method: float(np.mean(values)) for method, values in areas.items()}
    return {"auroc": means, "rounds": rounds}


def left_out(y: Codes) -> list[Codes]:
    """Cut the labels into rounds, such that at least two stay each time."""
    present = np.unique(y)
    if len(present) < 3:
        return []
    order = np.random.default_rng(0).permutation(present)
    return [np.sort(part) for part in np.array_split(order, min(LEFT_OUT, len(present)))]


def _scores(
    rows: Sample,
    fitted: Codes,
    wanted: list[Codes],
    labels: tuple[str, ...],
    methods: tuple[str, ...],
    **how: Any,
) -> dict[str, list[Array]]:
    """Fit classifier and detectors on some rows; return the scores of others."""
    z, y, kinds = rows
    classifier = fit(z[fitted], y[fitted], labels, how["strength"], how["class_weight"])
    logits = functools.cache(lambda n: classifier.logits(z[wanted[n]]) / how["temperature"])
    found = {}
    for method in methods:
        detector = make(method, z[fitted], kinds[fitted])
        found[method] = [detector.score(z[w], logits(n)) for n, w in enumerate(wanted)]
    return found
