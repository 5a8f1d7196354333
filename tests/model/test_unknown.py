from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from pomona.model import classifier as cls
from pomona.model import metrics, sampling, unknown
from tests.model.blobs import blobs

pytest.importorskip("sklearn")


@pytest.mark.parametrize("method", unknown.METHODS)
def test_far_photos_score_below_known_ones(method: str) -> None:
    z, y = blobs(4, 60)
    names = ("a", "b", "c", "d")
    classifier = cls.fit(z, y, names, 0.01)
    between = z[y == 0][:40] * 0.5 + z[y == 1][:40] * 0.5
    detector = unknown.make(method, z, y)
    inside, outside = (detector.score(x, classifier.logits(x)) for x in (z, between))
    assert metrics.auroc(inside, outside) > 0.9
    limit = unknown.threshold(inside, 0.95)
    assert (inside >= limit).mean() >= 0.94


def test_distance_is_mahalanobis() -> None:
    from scipy.spatial.distance import cdist
    from sklearn.covariance import ledoit_wolf

    z, y = blobs(3, 50)
    found = unknown.make("distance", z, y).score(z[:20], np.zeros((20, 3)))
    means = np.stack([z[y == n].astype(float).mean(axis=0) for n in range(3)])
    within, _ = ledoit_wolf(z - means[y], assume_centered=True)
    distances = cdist(z[:20], means, "mahalanobis", VI=np.linalg.inv(within))
    np.testing.assert_allclose(found, -(distances.min(axis=1) ** 2), rtol=1e-6)


def test_references_hold_every_kind() -> None:
    kinds = np.repeat(np.arange(30), [5000, *[2] * 29])
    chosen = sampling.pick_evenly(kinds, unknown.REFERENCES)
    assert len(chosen) == unknown.REFERENCES
    assert (np.bincount(kinds[chosen]) >= 2).all()


def test_labels_are_left_out_in_turn() -> None:
    z, y = blobs(7, 30)
    names = tuple("abcdefg")
    rounds = 0

    def count() -> None:
        nonlocal rounds
        rounds += 1

    settings = cls.Settings(strength=0.1)
    found = unknown.compare(sampling.Sample(z, y, names), settings, count)
    assert rounds == len(found["rounds"]) == 5
    assert sorted(chain.from_iterable(found["rounds"])) == list(names)
    assert set(found["auroc"]) == set(unknown.METHODS)
    assert found["auroc"]["distance"] > 0.9
    two = sampling.Sample(z, y % 2, ("a", "b"))
    assert unknown.compare(two, settings, count) == {}
