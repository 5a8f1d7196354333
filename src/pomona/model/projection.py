"""The projection: mergeable moments, scaler and PCA in NumPy. No Spark, no files of features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pomona.core.errors import MismatchError, RequestError
from pomona.core.files import FORMAT, read_json, sha256, write_json
from pomona.model.sampling import Array, Flags, Rows

CONSTANT = 1e-12
"""A feature whose variance is below this share of its mean square doesn't vary: it is rounding."""


def raised(rows: Rows, power: float) -> Array:
    """Return sign(x) |x|^power in float64: power normalisation (Perronnin et al. 2010).

    Features are means of many activations, mostly small: the square root brings their distribution
    nearer to a normal one. With 1 nothing changes. Runs on workers.
    """
    x = rows.astype(np.float64)
    return x if power == 1 else np.sign(x) * np.abs(x) ** power


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of rows: enough to fit scaler and PCA, and small enough to merge."""

    count: int
    mean: Array  # float64 [d]
    scatter: Array  # Σ(x − mean)(x − mean)ᵀ, float64 [d, d]

    @staticmethod
    def of(rows: Rows) -> Moments:
        """Return the moments of rows [n, d]. Runs on workers."""
        x = rows.astype(np.float64)
        if not len(x):
            return Moments(0, np.zeros(x.shape[1]), np.zeros((x.shape[1],) * 2))
        mean = x.mean(axis=0)
        x -= mean
        return Moments(len(x), mean, x.T @ x)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows (Chan, Golub and LeVeque 1979, for matrices)."""
        if not self.count or not other.count:
            return other if not self.count else self
        count = self.count + other.count
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter += np.outer(step, step) * (self.count * other.count / count)
        return Moments(count, self.mean + step * (other.count / count), scatter)


def merge(parts: Iterable[Moments]) -> Moments:
    """Merge from left to right, two at a time: the order decides the last bits, so it is fixed."""
    nothing = Moments(0, np.zeros(0), np.zeros((0, 0)))
    return reduce(Moments.merge, parts, nothing)


@dataclass(frozen=True)
class Projection:
    """Power, scaler and PCA: d features to k pca_features.

    Attributes
    ----------
    mean, scale
        float64 [d]: a feature x becomes (x^power − mean) / scale. A constant feature has scale 1.
    components
        float64 [k, d], orthonormal rows; of each, the entry largest in size is positive.
    explained_variance
        float64 [k], with the divisor n − 1, as Spark ML's StandardScaler and PCA have it.
    explained_variance_ratio
        float64 [r] for all r components with variance, so that the whole curve can be drawn.
    count
        Rows that it was fitted on.
    """

    mean: Array
    scale: Array
    components: Array
    explained_variance: Array
    explained_variance_ratio: Array
    count: int
    scaled: bool = True
    whiten: bool = False
    power: float = 1.0

    @property
    def k(self) -> int:
        """Number of components kept."""
        return len(self.components)

    @property
    def kept(self) -> float:
        """Share of the variance that the components keep."""
        return float(self.explained_variance_ratio[: self.k].sum())

    def linear(self) -> Array:
        """Return W [k, d] of the same map, x ↦ W (x^power − mean)."""
        weight = self.components / self.scale
        if self.whiten:
            weight = weight / np.sqrt(self.explained_variance)[:, None]
        return weight

    def transform(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Return pca_features, float32 [n, k]; computed in float64. Runs on workers."""
        centred = raised(rows, self.power) - self.mean
        return np.asarray(centred @ self.linear().T, np.float32)


def parse_components(text: str | int | float) -> int | float:
    """Read ``--components``: a whole number is a count, a decimal fraction a share of the variance.

    >>> parse_components("50"), parse_components("0.95")
    (50, 0.95)
    """
    number = str(text).strip()
    try:
        value = float(number) if "." in number or "e" in number.lower() else int(number)
    except ValueError:
        value = -1
    if value >= 1 if isinstance(value, int) else 0 < value <= 1:
        return value
    raise RequestError(
        f"--components is a count such as 50 or a share of the variance such as 0.95, not {text}"
    )


def fit(
    moments: Moments,
    components: int | float = 50,
    *,
    scale: bool = True,
    whiten: bool = False,
    power: float = 1.0,
) -> Projection:
    """Fit scaler and PCA: eigenvectors of the covariance of the (scaled) features.

    Parameters
    ----------
    moments
        Of the Training photos' features, `raised` to the power.
    components
        A count k, or a share of the variance: then the smallest k that keeps it.
    scale
        Bring features to standard deviation 1 (divisor n − 1) first.
    whiten
        Bring pca_features to standard deviation 1.

    Raises
    ------
    RequestError
        If there are too few photos, or nothing varies.
    """
    covariance, varies = _covariance(moments)
    most = min(moments.count - 1, int(varies.sum()))
    if isinstance(components, int) and components > most:
        raise RequestError(
            f"--components {components} is more than {moments.count} Training photos with "
            f"{varies.sum()} features that vary can have: {most} at most"
        )
    variance = np.diagonal(covariance)
    scales = np.where(varies & scale, np.sqrt(np.where(varies, variance, 1.0)), 1.0)
    covariance = (covariance / np.outer(scales, scales))[np.ix_(varies, varies)]
    values, vectors = _descending(covariance)
    rank = int((values > values[0] * len(values) * np.finfo(np.float64).eps).sum())
    ratio = values[: min(most, rank)] / np.trace(covariance)
    k = components if isinstance(components, int) else count_for(ratio, components)
    if whiten and k > len(ratio):
        raise RequestError(f"--whiten: only {len(ratio)} components have variance, not {k}")
    rows = np.zeros((k, len(varies)))
    rows[:, varies] = vectors[:k]
    return Projection(
        moments.mean, scales, rows, values[:k], ratio, moments.count, scale, whiten, power
    )


def _covariance(moments: Moments) -> tuple[Array, Flags]:
    """Return the covariance [d, d] of the features, and which of them vary."""
    if moments.count < 2:
        raise RequestError(
            f"PCA needs at least 2 Training photos with features; there are {moments.count}"
        )
    covariance = moments.scatter / (moments.count - 1)
    variance = np.diagonal(covariance)
    varies = variance > CONSTANT * (moments.mean**2 + variance)
    if not varies.any():
        raise RequestError("all Training photos have the same features: there is nothing to reduce")
    return covariance, varies


def _descending(covariance: Array) -> tuple[Array, Array]:
    """Return eigenvalues [d] and eigenvectors [d, d] (rows), largest first, signs fixed."""
    values, vectors = np.linalg.eigh(covariance)
    values, rows = np.maximum(values[::-1], 0.0), vectors.T[::-1]
    largest = np.abs(rows).argmax(axis=1)
    signs = np.where(rows[np.arange(len(rows)), largest] < 0, -1.0, 1.0)
    return values, np.ascontiguousarray(rows * signs[:, None])


def count_for(ratio: Array, share: float) -> int:
    """Return the smallest number of components that keep a share of the variance.

    >>> count_for(np.array([0.6, 0.3, 0.1]), 0.8)
    2
    >>> count_for(np.array([0.6, 0.3, 0.0999]), 1.0)
    3
    """
    kept = np.cumsum(ratio)
    # Rounding may leave the sum of all below 1: then all are needed (argmax would say one).
    return min(int(np.searchsorted(kept, share - 1e-12)) + 1, len(ratio))


_TENSORS = ("mean", "scale", "components", "explained_variance", "explained_variance_ratio")


def save_projection(projection: Projection, folder: Path, made_from: dict[str, Any]) -> None:
    """Write ``projection.safetensors`` and ``projection.json``."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "projection.safetensors"
    save_file({name: np.ascontiguousarray(getattr(projection, name)) for name in _TENSORS}, file)
    about = {
        "format": FORMAT,
        "components": projection.k,
        "features": len(projection.mean),
        "photos": projection.count,
        "scaled": projection.scaled,
        "whiten": projection.whiten,
        "power": projection.power,
        "variance_kept": projection.kept,
        "sha256": sha256(file),
        "made_from": made_from,
    }
    write_json(folder / "projection.json", about)


def load_projection(folder: Path) -> Projection:
    """Read what `save_projection` wrote. Runs no code from the files.

    RequestError if they are missing, MismatchError if they were changed or are of a newer format.
    """
    from safetensors.numpy import load_file

    about = read_json(folder / "projection.json")
    file = folder / "projection.safetensors"
    if not about or not file.is_file():
        raise RequestError(f"there is no projection in {folder}: pomona reduce makes it")
    if sha256(file) != about["sha256"]:
        raise MismatchError(f"{file} was changed or damaged: run pomona reduce again")
    tensors: dict[str, Any] = load_file(file)
    return Projection(
        **{name: tensors[name] for name in _TENSORS},
        count=about["photos"],
        scaled=about["scaled"],
        whiten=about["whiten"],
        power=about.get("power", 1.0),  # files of 0.1.0 have none
    )
