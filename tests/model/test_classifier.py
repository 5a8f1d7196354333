from __future__ import annotations

import numpy as np
import pytest

from pomona.core.errors import RequestError
from pomona.model import classifier as cls
from pomona.model import metrics, sampling
from tests.model.blobs import blobs

sklearn = pytest.importorskip("sklearn")


@pytest.mark.parametrize("labels", [2, 4])
def test_probabilities_are_scikit_learns(labels: int) -> None:
    from sklearn.linear_model import LogisticRegression

    z, y = blobs(labels)
    names = tuple(f"l{n}" for n in range(labels))
    ours = cls.fit(z, y, names, 0.1)
    theirs = LogisticRegression(C=0.1, max_iter=2000, tol=1e-3).fit(z, y)
    np.testing.assert_allclose(ours.probabilities(z), theirs.predict_proba(z), atol=1e-5)
    again = cls.fit(z, y, names, 0.1)
    assert (again.weight == ours.weight).all()


def test_a_label_that_the_fit_didnt_see_gets_nothing() -> None:
    z, y = blobs()
    found = cls.fit(z[y != 1], y[y != 1], ("a", "b", "c", "d"), 1.0)
    assert (found.probabilities(z)[:, 1] == 0).all()
    np.testing.assert_allclose(found.probabilities(z).sum(axis=1), 1)


def test_class_weights_help_the_rare_label() -> None:
    rng = np.random.default_rng(1)
    z = np.concatenate([rng.normal(0, 1, (500, 2)), rng.normal(1.5, 1, (20, 2))]).astype(np.float32)
    y = np.repeat([0, 1], [500, 20])
    found = {w: cls.fit(z, y, ("many", "few"), 1.0, w) for w in ("none", "balanced")}
    recall = {w: f.probabilities(z)[500:].argmax(axis=1).mean() for w, f in found.items()}
    assert recall["balanced"] > recall["none"]


def test_whole_groups_go_into_one_fold() -> None:
    y = np.repeat([0, 1], 60)
    groups = np.repeat(np.arange(12), 10)
    cut = sampling.folds(y, groups)
    assert len(cut) == 5
    for train, test in cut:
        assert not set(groups[train]) & set(groups[test])
    assert sorted(np.concatenate([test for _, test in cut])) == list(range(120))
    assert sampling.usable_groups(y, np.repeat([0, 1], 60)) is None
    assert sampling.usable_groups(y, groups) is groups


def test_a_label_with_one_photo_is_not_judged() -> None:
    z, y = blobs(3, 10)
    z, y = np.concatenate([z, z[:1] + 9]), np.append(y, 3)
    sample = sampling.Sample(z, y, ("a", "b", "c", "d"))
    found = cls.trial(sample, sampling.folds(y, None), 1.0, "none")
    assert sorted(found.rows) == list(range(30))
    assert sampling.folds(np.array([0, 1]), None) == []


def test_one_label_is_refused() -> None:
    with pytest.raises(RequestError, match=r"Training has only one \(Apple\)"):
        cls.encode(["Apple", "Apple"])
    with pytest.raises(RequestError, match="Training has none"):
        cls.encode([])


def test_the_temperature_undoes_overconfidence() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4000, 3)) * 2
    y = np.array([rng.choice(3, p=p) for p in cls.softmax(logits)])
    assert cls.temperature(logits * 3, y) == pytest.approx(3, rel=0.1)
    before = metrics.calibration_error(cls.softmax(logits * 3), y)
    assert metrics.calibration_error(cls.softmax(logits), y) < before / 2
    assert cls.temperature(np.zeros((0, 3)), np.zeros(0, np.int64)) == 1
    missing = np.concatenate([logits * 3, np.full((4000, 1), -np.inf)], axis=1)
    assert cls.temperature(missing, y) == pytest.approx(3, rel=0.1)
