"""What a finetune holds out, and evaluates."""

from __future__ import annotations

import numpy as np

from pomona.pipeline.finetune_dataset import hold_out, sample_by_group


def test_whole_groups_are_held_out_of_each_label() -> None:
    labels = np.repeat([0, 1, 2], [60, 40, 20])
    groups = np.concatenate([np.arange(60) % 6, 6 + np.arange(40) % 4, np.full(20, 10)])
    seen: set[int] = set()
    for fold in range(5):
        rows = hold_out(labels, groups, 0.2, 7, fold)
        rest = np.setdiff1d(np.arange(120), rows)
        assert set(labels[rest]) == {0, 1, 2} == set(labels[rows])
        both = set(groups[rows]) & set(groups[rest])
        assert both == {10}  # the label of one group: of its photos some
        seen |= set(groups[rows].tolist())
    assert seen == set(range(11))


def test_evaluations_are_even_by_group() -> None:
    groups = np.repeat([0, 1], [900, 30])
    rows = sample_by_group(np.arange(930), groups, 40, 0)
    assert np.bincount(groups[rows]).tolist() == [20, 20]
