"""Which rows a fit sees: cross-validation folds that keep groups whole, and even picks by label."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.floating[Any]]
Codes = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Fold = tuple[Codes, Codes]
"""(rows to fit, rows to judge)."""

FOLDS = 5
SEED = 0


@dataclass(frozen=True)
class Sample:
    """Photos on which a classifier is fitted or its settings are chosen."""

    z: Rows  # pca_features, float [n, k]
    y: Codes  # the labels [n]
    labels: tuple[str, ...]  # all, also those that don't occur in y; a code is an index into them
    groups: Codes | None = None  # [n]; None where photos are held out one by one
    unseen: Flags | None = None  # [n]: the backbone's weights were not tuned on them; None: all

    @property
    def tuned(self) -> bool:
        """Whether the backbone's weights were tuned on some of the photos."""
        return self.unseen is not None and not self.unseen.all()

    @property
    def kinds(self) -> Codes:
        """Code [n] of what a detector of the unknown has a centre for: the group or the label.

        Weights that were tuned on a group bring its photos together, far from all others.
        """
        return self.y if self.groups is None or self.tuned else self.groups

    def at_most(self, count: int) -> Sample:
        """Return the sample itself, or so many of its photos, drawn at random."""
        if len(self.y) <= count:
            return self
        rows = np.sort(np.random.default_rng(SEED).permutation(len(self.y))[:count])
        groups = None if self.groups is None else self.groups[rows]
        unseen = None if self.unseen is None else self.unseen[rows]
        return replace(self, z=self.z[rows], y=self.y[rows], groups=groups, unseen=unseen)


def usable_groups(y: Codes, groups: Codes | None) -> Codes | None:
    """Return the groups, or None where they can't be left out: fewer than two labels have two."""
    if groups is None:
        return None
    return groups if (_groups_by_label(y, groups) >= 2).sum() >= 2 else None


def _groups_by_label(y: Codes, groups: Codes) -> Codes:
    pairs = np.unique(np.stack([y, groups]), axis=1)
    return np.bincount(pairs[0])


def folds(y: Codes, groups: Codes | None, count: int = FOLDS) -> list[Fold]:
    """Cut rows into folds, stratified by label; a group is never torn apart.

    There are none where there are too few photos to hold any out: no label has two.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    units = np.bincount(y) if groups is None else _groups_by_label(y, groups)
    count = min(count, int(units.max()))
    if count < 2:
        return []
    splitter = StratifiedKFold if groups is None else StratifiedGroupKFold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a label with fewer photos than folds
        splits = splitter(count, shuffle=True, random_state=SEED).split(y, y, groups)
        return [fold for fold in splits if len(np.unique(y[fold[0]])) >= 2 and len(fold[1])]


def judged(y: Codes, fold: Fold) -> Codes:
    """Return the rows that a fold judges: those whose label occurs among the rows to fit."""
    to_fit, to_judge = fold
    return to_judge[np.isin(y[to_judge], y[to_fit])]


def pick_evenly(kinds: Codes, most: int) -> Codes:
    """Choose up to so many rows at random, of each kind as many as there is room for.

    >>> pick_evenly(np.array([0, 0, 0, 0, 1]), 2).tolist()
    [2, 4]
    """
    order = np.random.default_rng(SEED).permutation(len(kinds))
    order = order[np.argsort(kinds[order], kind="stable")]
    _, starts, counts = np.unique(kinds[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(starts, counts)  # within its kind
    return np.sort(order[np.argsort(rank, kind="stable")][:most])
