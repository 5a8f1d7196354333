from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pomona.model import metrics

pytest.importorskip("sklearn")


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


def test_per_label() -> None:
    guess, y = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    first, second, third = metrics.per_label(guess, y, ("a", "b", "c"))
    assert (first["precision"], first["recall"]) == (0.5, 1.0)
    assert (second["precision"], second["recall"]) == (1.0, pytest.approx(2 / 3))
    assert [row["photos"] for row in (first, second, third)] == [1, 3, 0]
    assert third["precision"] is third["recall"] is third["f1"] is None


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
