"""Scores that tell photos of known labels from photos of something else. NumPy to apply.

All scores are higher for photos that look known. Which one is best depends on the data, so
`compare` leaves whole labels out and measures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pomona.model.classifier import Settings, fit, softmax
from pomona.model.metrics import auroc
from pomona.model.sampling import Array, Codes, Fold, Rows, Sample, folds, judged, pick_evenly

METHODS = ("max_probability", "energy", "distance", "neighbours")
CENTRES = ("distance", "neighbours")
"""The methods that need tensors: ``whitening`` and ``centres``."""
REFERENCES = 2000
"""Photos that ``neighbours`` keeps, evenly of all kinds: 400 kB with 50 components."""
ROUNDS = 5
"""How often some of the labels are left out."""
DEFAULT = "distance"
"""Where there are too few labels to compare."""


@dataclass(frozen=True)
class Detector:
    """A score, one of `METHODS`, and the threshold below which a photo is unknown.

    For ``distance`` and ``neighbours`` the tensors are ``whitening`` [k, k], after which the
    covariance within kinds is the identity, and ``centres`` [m, k], whitened.
    """

    method: str
    tensors: dict[str, Array] = field(default_factory=dict)
    threshold: float = -np.inf

    def score(self, z: Rows, logits: Array) -> Array:
        """Return float64 [n], from pca_features [n, k] and logits divided by the temperature."""
        return _SCORES[self.method](z.astype(np.float64), logits, self.tensors)


def squared_distances(z: Array, centres: Array) -> Array:
    """Return the squared Euclidean distances [n, m] between rows of z [n, k] and centres [m, k]."""
    squares = (z**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)
    return np.asarray(squares - 2 * z @ centres.T)


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
    who take the cosine; that accepts photos of something else altogether, see docs/log.md).
    """
    squares = squared_distances(z @ tensors["whitening"], tensors["centres"])
    return np.asarray(-squares.min(axis=1))


_SCORES: dict[str, Callable[[Array, Array, dict[str, Array]], Array]] = {
    "max_probability": _max_probability,
    "energy": _energy,
    "distance": _nearest,
    "neighbours": _nearest,
}


def make(method: str, z: Rows, kinds: Codes) -> Detector:
    """Fit a detector on known photos, float [n, k], and their kinds [n]: see `Sample.kinds`."""
    if method not in CENTRES:
        return Detector(method)
    rows = z.astype(np.float64)
    centres, whitening = _within(rows, kinds)
    if method == "neighbours":
        centres = rows[pick_evenly(kinds, max(REFERENCES, len(centres)))]
    return Detector(method, {"whitening": whitening, "centres": centres @ whitening})


def _within(z: Array, kinds: Codes) -> tuple[Array, Array]:
    """Return the means of the kinds [m, k], and W [k, k] that whitens the deviations from them."""
    from sklearn.covariance import ledoit_wolf

    _, codes = np.unique(kinds, return_inverse=True)
    counts = np.bincount(codes)
    means = np.stack([np.bincount(codes, column) / counts for column in z.T], axis=1)
    within, _ = ledoit_wolf(z - means[codes], assume_centered=True)
    values, vectors = np.linalg.eigh(within)
    most = values[-1] if values[-1] > 0 else 1.0  # one photo of each kind: no deviations
    return means, vectors / np.sqrt(np.maximum(values, most * 1e-6))


def threshold(scores: Array, keep: float) -> float:
    """Return the score that the given share of known photos reaches."""
    return float(np.quantile(scores, 1 - keep)) if len(scores) else -np.inf


def held_out(method: str, sample: Sample, splits: list[Fold], settings: Settings) -> Array:
    """Return the scores of the judged rows, each from a detector that wasn't fitted on it."""
    scores = [
        _scores(sample, fold[0], [held], (method,), settings)[method][0]
        for fold in splits
        if len(held := judged(sample.y, fold))
    ]
    return np.concatenate(scores) if scores else np.zeros(0)


def compare(sample: Sample, settings: Settings, on_done: Callable[[], None]) -> dict[str, Any]:
    """Leave whole labels out and measure which score tells their photos from held-out known ones.

    Returns ``auroc`` by method, mean over the rounds, and ``rounds`` (the labels left out in each);
    nothing where there are fewer than three labels.
    """
    rounds: list[list[str]] = []
    areas: dict[str, list[float]] = {method: [] for method in METHODS}
    for away in left_out(sample.y):
        on_done()
        is_away = np.isin(sample.y, away)
        stay = np.flatnonzero(~is_away)
        y = sample.y[stay]
        splits = folds(y, None if sample.groups is None else sample.groups[stay])
        if not splits or not len(known := judged(y, splits[0])):
            continue
        scores = _scores(
            sample, stay[splits[0][0]], [stay[known], np.flatnonzero(is_away)], METHODS, settings
        )
        for method, (inside, outside) in scores.items():
            areas[method].append(auroc(inside, outside))
        rounds.append([sample.labels[code] for code in away])
    if not rounds:
        return {}
    means = {method: float(np.mean(values)) for method, values in areas.items()}
    return {"auroc": means, "rounds": rounds}


def left_out(y: Codes) -> list[Codes]:
    """Share the labels out among rounds, such that at least two stay each time."""
    present = np.unique(y)
    if len(present) < 3:
        return []
    order = np.random.default_rng(0).permutation(present)
    return [np.sort(part) for part in np.array_split(order, min(ROUNDS, len(present)))]


def _scores(
    sample: Sample, fitted: Codes, wanted: list[Codes], methods: tuple[str, ...], settings: Settings
) -> dict[str, list[Array]]:
    """Fit classifier and detectors on some rows; return the scores of others, by method."""
    z, y = sample.z, sample.y
    classifier = fit(z[fitted], y[fitted], sample.labels, settings.strength, settings.class_weight)
    logits = functools.cache(lambda n: classifier.logits(z[wanted[n]]) / settings.temperature)
    scores = {}
    for method in methods:
        detector = make(method, z[fitted], sample.kinds[fitted])
        scores[method] = [detector.score(z[rows], logits(n)) for n, rows in enumerate(wanted)]
    return scores
