from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from pomona.core.errors import MismatchError, RequestError
from pomona.model import projection
from pomona.model.projection import Moments, Projection, count_for, fit, merge, parse_components


def samples(n: int = 400, d: int = 30, seed: int = 0) -> Any:
    """Correlated, with means and scales that differ, as ReLU features have."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(n, 8)) * np.linspace(3, 0.5, 8)
    x = latent @ rng.normal(size=(8, d)) + 0.3 * rng.normal(size=(n, d))
    x = np.maximum(x * rng.uniform(0.1, 20, d) + rng.uniform(0, 50, d), 0)
    return x.astype(np.float32)


def up_to_sign(a: Any, b: Any) -> Any:
    return a * np.sign((a * b).sum(axis=0))


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("whiten", [True, False])
def test_scikit_learn_agrees(scale: bool, whiten: bool) -> None:
    """Its StandardScaler divides by n: with its scale times √(n/(n−1)) both are the same."""
    x = samples().astype(np.float64)
    n = len(x)
    found = fit(Moments.of(x), 10, scale=scale, whiten=whiten)
    scaled = x
    if scale:
        scaled = StandardScaler().fit_transform(x) * np.sqrt((n - 1) / n)
    pca = PCA(10, svd_solver="full", whiten=whiten).fit(scaled)
    np.testing.assert_allclose(found.explained_variance, pca.explained_variance_, rtol=1e-8)
    np.testing.assert_allclose(
        found.explained_variance_ratio[:10], pca.explained_variance_ratio_, rtol=1e-8
    )
    wanted = pca.transform(scaled)
    scores = up_to_sign(found.transform(x), wanted)
    assert np.abs(scores - wanted).max() <= 1e-5 * np.ptp(wanted)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=6), seed=st.integers(0, 5))
def test_moments_merge_however_rows_are_cut(cuts: list[int], seed: int) -> None:
    x = samples(60, 7, seed)
    bounds = [0, *sorted(cuts), 60]
    parts = [Moments.of(x[a:b]) for a, b in pairwise(bounds)]
    whole, merged = Moments.of(x), merge(parts)
    assert merged.count == whole.count == 60
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-9, atol=1e-9)


def test_large_means_lose_nothing() -> None:
    """Where Σx² − n·mean² would lose every digit."""
    x = samples(300, 5).astype(np.float64)
    far = merge([Moments.of(x[:100] + 1e7), Moments.of(x[100:] + 1e7)])
    np.testing.assert_allclose(far.scatter, Moments.of(x).scatter, rtol=1e-6)


def test_constant_features_stay_zero() -> None:
    x = samples(50, 6)
    x[:, 2] = 7.3
    x[:, 4] = 0
    found = fit(merge([Moments.of(x[:13]), Moments.of(x[13:])]), 3)
    assert found.scale[2] == found.scale[4] == 1
    assert not found.components[:, [2, 4]].any()
    assert np.isfinite(found.transform(x)).all()
    assert found.explained_variance_ratio.sum() == pytest.approx(1)


def test_signs_are_fixed() -> None:
    x = samples()
    one = fit(Moments.of(x), 5)
    two = fit(merge([Moments.of(x[:77]), Moments.of(x[77:])]), 5)
    np.testing.assert_allclose(one.components, two.components, atol=1e-9)
    largest = np.abs(one.components).argmax(axis=1)
    assert (one.components[np.arange(5), largest] > 0).all()


def test_a_share_finds_k() -> None:
    x = samples()
    found = fit(Moments.of(x), 0.9)
    assert found.kept >= 0.9 > found.explained_variance_ratio[: found.k - 1].sum()
    assert fit(Moments.of(x), 1.0).k == 30
    ten = samples(10, 30)
    assert fit(Moments.of(ten), 1.0).k == 9


def test_a_target_that_rounding_never_reaches_takes_all() -> None:
    assert count_for(np.array([0.5, 0.3, 0.1]), 0.99) == 3
    assert count_for(np.array([1.0]), 0.5) == 1


def test_whitened_scores_have_unit_variance() -> None:
    x = samples()
    scores = fit(Moments.of(x), 6, whiten=True).transform(x).astype(np.float64)
    np.testing.assert_allclose(np.cov(scores.T), np.eye(6), atol=1e-4)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_photos(n: int) -> None:
    with pytest.raises(RequestError, match=f"at least 2 Training photos.*{n}"):
        fit(Moments.of(samples(n, 5)), 1)


def test_more_components_than_there_can_be() -> None:
    with pytest.raises(RequestError, match="9 at most"):
        fit(Moments.of(samples(10, 30)), 10)
    assert fit(Moments.of(samples(10, 30)), 9).k == 9
    with pytest.raises(RequestError, match="30 at most"):
        fit(Moments.of(samples(50, 30)), 31)


def test_nothing_varies() -> None:
    with pytest.raises(RequestError, match="same features"):
        fit(Moments.of(np.ones((5, 4), np.float32)), 1)


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "0.0", "many", "", "nan", "inf"])
def test_components_have_a_rule(text: str) -> None:
    with pytest.raises(RequestError, match="--components is a count"):
        parse_components(text)


def test_files(tmp_path: Path) -> None:
    found = fit(Moments.of(samples()), 4, whiten=True)
    projection.save_projection(found, tmp_path, {"features": "abc"})
    again = projection.load_projection(tmp_path)
    x = samples(20)
    assert (again.transform(x) == found.transform(x)).all()
    assert isinstance(again, Projection)
    assert (again.k, again.count, again.whiten) == (4, 400, True)
    file = tmp_path / "projection.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(MismatchError, match="changed or damaged"):
        projection.load_projection(tmp_path)
    about = tmp_path / "projection.json"
    about.write_text(about.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(MismatchError, match="newer Pomona"):
        projection.load_projection(tmp_path)
    with pytest.raises(RequestError, match="pomona reduce"):
        projection.load_projection(tmp_path / "no")
