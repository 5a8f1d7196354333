"""The classifier: multinomial logistic regression on pca_features, and its temperature.

Fitting needs scikit-learn (extra ``train``) and runs on the driver; applying is NumPy.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from pomona.core.cpus import available_cpus
from pomona.core.errors import MissingError, RequestError
from pomona.model.sampling import Array, Codes, Fold, Rows, Sample, judged

STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""scikit-learn's C, strongest regularisation first."""


def check_sklearn() -> None:
    """Raise MissingError, with the remedy, if scikit-learn isn't there."""
    if find_spec("sklearn") is None:
        raise MissingError(
            "training needs scikit-learn: pip install 'pomona[train]' "
            "(pomona run --no-train leaves training out)"
        )


@dataclass(frozen=True)
class Classifier:
    """From pca_features to probabilities."""

    labels: tuple[str, ...]  # sorted; a code is an index into them
    weight: Array  # float64 [labels, k]
    bias: Array  # float64 [labels]; −∞ for a label that the fit didn't see
    temperature: float = 1.0  # logits are divided by it (Guo et al. 2017)

    def logits(self, z: Rows) -> Array:
        """Return float64 [n, labels], divided by the temperature."""
        return (z.astype(np.float64) @ self.weight.T + self.bias) / self.temperature

    def probabilities(self, z: Rows) -> Array:
        """Return float64 [n, labels]; rows sum to 1."""
        return softmax(self.logits(z))


def softmax(logits: Array) -> Array:
    """Return probabilities, row by row."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Settings:
    """What is chosen for a classifier before it is fitted on all photos."""

    class_weight: str = "none"  # or balanced: labels weigh the same however many photos they have
    strength: float = 1e-2  # scikit-learn's C: the smaller, the stronger the penalty on weights
    temperature: float = 1.0


def fit(
    z: Rows, y: Codes, labels: tuple[str, ...], strength: float, class_weight: str = "none"
) -> Classifier:
    """Fit by L-BFGS; the same rows give the same classifier.

    Parameters
    ----------
    z, y
        float [n, k], and codes [n] of at least two of the ``labels``.
    strength, class_weight
        As in `Settings`.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    estimator = LogisticRegression(
        C=strength,
        max_iter=2000,
        tol=1e-3,
        class_weight=None if class_weight == "none" else class_weight,
    )
    with warnings.catch_warnings():
        # A fit that stops at max_iter is judged on held-out photos like any other.
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimator.fit(z, y)
    weight = np.zeros((len(labels), z.shape[1]))
    bias = np.full(len(labels), -np.inf)
    seen, coef, intercept = estimator.classes_, estimator.coef_, estimator.intercept_
    if len(seen) == 2:  # scikit-learn has one row for both; half each makes softmax that sigmoid
        coef = np.concatenate([-coef, coef]) / 2
        intercept = np.concatenate([-intercept, intercept]) / 2
    weight[seen], bias[seen] = coef, intercept
    return Classifier(labels, weight, bias)


def one_thread_each() -> Any:
    """Return a context manager that keeps BLAS to one thread: folds run side by side.

    BLAS threads wait for each other by spinning, which made a fit a hundred times slower on a busy
    machine (docs/log.md); and with one thread sums come out the same on any machine.
    """
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, "blas")


@dataclass(frozen=True)
class Trial:
    """One strength under cross-validation."""

    strength: float  # C
    rows: Codes  # those that were judged, each once
    logits: Array  # float64 [rows, labels], each row's from the fit that didn't see it
    accuracy: float  # share of the judged rows that were right


def trial(sample: Sample, splits: list[Fold], strength: float, class_weight: str) -> Trial:
    """Fit on the first part of each fold and judge the second."""
    z, y = sample.z, sample.y
    held_out = [judged(y, fold) for fold in splits]

    def fold_logits(fold: Fold, held: Codes) -> Array:
        fitted = fit(z[fold[0]], y[fold[0]], sample.labels, strength, class_weight)
        return fitted.logits(z[held])

    with one_thread_each(), ThreadPoolExecutor(available_cpus()) as pool:
        logits = np.concatenate(list(pool.map(fold_logits, splits, held_out)))
    rows = np.concatenate(held_out)
    right = logits.argmax(axis=1) == y[rows]
    return Trial(strength, rows, logits, float(right.mean()) if len(rows) else 0.0)


def temperature(logits: Array, y: Codes) -> float:
    """Return the temperature with the least Brier score, between 0.05 and 20.

    Guo et al. 2017 minimise the log loss. Where whole groups are held out, some are wrong
    throughout, and a few of these dominate the log loss: it made the calibration error larger,
    while the Brier score, also a proper score, halved it (docs/log.md). The logits, float64
    [n, labels], are of held-out photos, −∞ where a fit didn't know the label.
    """
    from scipy.optimize import minimize_scalar

    if not len(y):
        return 1.0

    def brier(log_t: float) -> float:
        probabilities = softmax(logits / np.exp(log_t))
        own = probabilities[np.arange(len(y)), y]
        return float(((probabilities**2).sum(axis=1) - 2 * own).mean())

    least = minimize_scalar(brier, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(least.x))


def encode(names: list[str]) -> tuple[tuple[str, ...], Codes]:
    """Return the labels, sorted, and each name's code; RequestError for fewer than two labels."""
    labels, codes = np.unique(np.asarray(names, object).astype(str), return_inverse=True)
    if len(labels) < 2:
        only = f"only one ({labels[0]})" if len(labels) else "none"
        raise RequestError(
            f"a classifier needs photos of two labels, and Training has {only}: check --label, or "
            "leave training out with pomona run --no-train"
        )
    return tuple(str(name) for name in labels), codes.astype(np.int64)
