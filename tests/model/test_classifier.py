from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest

from pomona.core.errors import RequestError
from pomona.model import classifier as cls
from pomona.model import metrics, unknown
from pomona.model.classifier import Codes

sklearn = pytest.importorskip("sklearn")


def blobs(labels: int = 4, each: int = 40, seed: int = 0) -> tuple[Any, Codes]:
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(labels), each)
    centres = rng.standard_normal((labels, 6)) * 4
    return (centres[y] + rng.standard_normal((len(y), 6))).astype(np.float32), y


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
    cut = cls.folds(y, groups)
    assert len(cut) == 5
    for train, test in cut:
        assert not set(groups[train]) & set(groups[test])
    assert sorted(np.concatenate([test for _, test in cut])) == list(range(120))
    assert cls.usable_groups(y, np.repeat([0, 1], 60)) is None
    assert cls.usable_groups(y, groups) is groups


def test_a_label_with_one_photo_is_not_judged() -> None:
    z, y = blobs(3, 10)
    z, y = np.concatenate([z, z[:1] + 9]), np.append(y, 3)
    found = cls.trial(z, y, ("a", "b", "c", "d"), cls.folds(y, None), 1.0, "none")
    assert sorted(found.rows) == list(range(30))
    assert cls.folds(np.array([0, 1]), None) == []


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


# --- metrics -----------------------------------------------------------------------------------


def test_metrics_are_scikit_learns() -> None:
    from sklearn.metrics import f1_score, roc_auc_score, top_k_accuracy_score

    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), 300)
    y = np.where(rng.random(300) < 0.5, p.argmax(axis=1), rng.integers(0, 5, 300))
    found = metrics.measure(p, y, np.arange(300), draws=200)
    guess = p.argmax(axis=1)
    assert found["accuracy"]["value"] == pytest.approx((guess == y).mean())
    assert found["macro_f1"]["value"] == pytest.approx(f1_score(y, guess, average="macro"))
    assert found["top_3"]["value"] == pytest.approx(top_k_accuracy_score(y, p, k=3))
    for name in ("accuracy", "macro_f1", "top_3"):
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
    known, other = rng.normal(1, 1, 50), rng.normal(0, 1, 70).round(1)
    truth = np.repeat([1, 0], [50, 70])
    assert metrics.auroc(known, other) == pytest.approx(
        roc_auc_score(truth, np.concatenate([known, other]))
    )


def test_intervals_are_wider_by_group() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(10), 50)
    right = np.repeat(rng.random(10) < 0.6, 50)
    p = np.where(right[:, None], [[0.9, 0.1]], [[0.1, 0.9]])
    y = np.zeros(500, np.int64)
    wide, narrow = (metrics.measure(p, y, units, 300) for units in (groups, np.arange(500)))

    def width(found: Any) -> float:
        return float(found["accuracy"]["high"] - found["accuracy"]["low"])

    assert wide["units"] == 10
    assert width(wide) > 3 * width(narrow)


def test_coverage_of_the_interval() -> None:
    """Of 95 % intervals about 95 % hold the truth."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        y = (rng.random(200) < 0.3).astype(np.int64)
        found = metrics.measure(np.tile([0.8, 0.2], (200, 1)), y, np.arange(200), 200)["accuracy"]
        hits += found["low"] <= 0.7 <= found["high"]
    assert hits >= 52


def test_the_calibration_error_by_hand() -> None:
    p = np.array([[0.9, 0.1]] * 10 + [[0.3, 0.7]] * 10)
    y = np.array([0] * 7 + [1] * 3 + [1] * 7 + [0] * 3)
    assert metrics.calibration_error(p, y) == pytest.approx(0.5 * 0.2 + 0.5 * 0.0)
    rows = metrics.reliability(p, y)
    assert [(r["photos"], round(r["accuracy"], 2)) for r in rows] == [(10, 0.7), (10, 0.7)]


def test_per_label_and_confusion() -> None:
    table = metrics.confusion(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), 3)
    assert table.tolist() == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    first, second, third = metrics.per_label(table, ("a", "b", "c"))
    assert (first["precision"], first["recall"]) == (0.5, 1.0)
    assert (second["precision"], second["recall"]) == (1.0, pytest.approx(2 / 3))
    assert third["f1"] is None


def test_the_paired_test() -> None:
    from scipy.stats import binomtest

    rng = np.random.default_rng(0)
    old = rng.random(400) < 0.8
    new = old.copy()
    new[np.flatnonzero(~old)[:18]] = True
    new[np.flatnonzero(old)[:6]] = False
    exact = binomtest(18, 24, alternative="greater").pvalue  # McNemar's exact test
    assert metrics.paired_test(new, old, np.arange(400)) == pytest.approx(exact, abs=0.005)
    assert metrics.paired_test(old, old, np.arange(400)) == 1
    # All from one group: one unit tells nothing.
    assert metrics.paired_test(new, old, np.zeros(400, np.int64)) > 0.4


# --- unknown -----------------------------------------------------------------------------------


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
    chosen = unknown._references(kinds)
    assert len(chosen) == unknown.REFERENCES
    assert (np.bincount(kinds[chosen]) >= 2).all()


def test_labels_are_left_out_in_turn() -> None:
    z, y = blobs(7, 30)
    names = tuple("abcdefg")
    rounds = 0

    def count() -> None:
        nonlocal rounds
        rounds += 1

    how = {"strength": 0.1, "class_weight": "none", "temperature": 1.0}
    found = unknown.compare((z, y, y), None, names, count, **how)
    assert rounds == len(found["rounds"]) == 5
    assert sorted(chain.from_iterable(found["rounds"])) == list(names)
    assert set(found["auroc"]) == set(unknown.METHODS)
    assert found["auroc"]["distance"] > 0.9
    assert unknown.compare((z, y % 2, y), None, ("a", "b"), count, **how) == {}
