"""How weights are trained: the recipe, the schedule, what is held out, how it is judged.

In NumPy: nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Recipe:
    """How weights are trained.

    Attributes
    ----------
    norm
        Whether batch norms take each batch's own statistics, as training from a random start needs.
        Otherwise they are folded into the convolutions before training: weights that come folded
        and weights that don't are then the same, a batch of one variety does no harm, and a step
        takes a third less time on a CPU.
    rate, head_rate
        AdamW's learning rates at the top of the schedule.
    decay
        AdamW's weight decay.
    smoothing
        Share of the label that is spread over all labels.
    average
        The weights that are judged and kept are a mean of those of about so long a share of the
        run, the latest weighing most.
    blend
        The result lies so far on the line from the start to the averaged weights (Wortsman et al.
        2022, "Robust fine-tuning of zero-shot models"): what is nearer to the start does better on
        what training didn't see.
    variety
        Weight of the second question, which variety it is; 0 leaves it out. Without it features
        come to tell labels and nothing else, and nothing is unknown to them any more.
    distill
        Weight of the distance to the teacher's features; 0 leaves it out.
    apart
        Share of the run at whose start each block learns by itself to give what the teacher's gives
        (Li et al. 2020, "Blockwisely supervised neural architecture search with knowledge
        distillation"). A random start learns much faster so.
    mixed
        Convolve in bfloat16.
    """

    image_size: int = 224
    batch_size: int = 32
    norm: bool = False
    rate: float = 2e-4
    head_rate: float = 5e-4
    decay: float = 1e-2
    warmup: float = 0.1
    smoothing: float = 0.1
    average: float = 0.15
    blend: float = 1.0
    variety: float = 0.5
    distill: float = 0.0
    apart: float = 0.0
    mixed: bool = False
    seed: int = 0


# --- the schedule ------------------------------------------------------------------------------


FIRST = 5
"""Steps whose speed says little: libraries warm up, and a pause looks like a slow machine."""

LONGEST = 60.0
"""Seconds that one of them counts for at most."""


@dataclass
class Plan:
    """How far a run is, in 0…1, whether its length is a number of steps or of seconds.

    With ``seconds`` the rest of the way is cut into as many steps as the time left allows at the
    speed of the last steps; so a machine that slows down still ends in time, at the end of the
    schedule. A step that takes much longer than the last ones (the machine slept, or the process
    was paused) doesn't count in full.
    """

    steps: int | None = None
    seconds: float | None = None
    share: float = 0.0
    spent: float = 0.0  # seconds
    typical: float = 0.0  # seconds for a step
    count: int = 0

    def advance(self, took: float) -> None:
        """Note that a step took so many seconds."""
        self.count += 1
        first = self.count <= FIRST
        usual = min(self.typical or took, took) if first else self.typical
        took = min(took, 5 * usual, LONGEST if first else math.inf)
        self.typical = usual if first else 0.9 * usual + 0.1 * took
        self.spent += took
        ways = []
        if self.steps is not None:
            ways.append(1 / self.steps)
        if self.seconds is not None:
            left = max(0.0, self.seconds - self.spent)
            way = (1 - self.share) / max(1.0, left / self.typical)
            ways.append(min(way, 0.01) if first and left else way)
        self.share = min(1.0, self.share + max(ways))
        if 1 - self.share < 1e-9:
            self.share = 1.0

    def left(self) -> float:
        """Return about how many seconds are left."""
        return self.spent * (1 - self.share) / self.share if self.share else 0.0


def factor(share: float, warmup: float) -> float:
    """Return what learning rates are multiplied by: up in a line, down in half a cosine.

    >>> factor(0.0, 0.1), factor(0.1, 0.1), round(factor(1.0, 0.1), 3)
    (0.01, 1.0, 0.0)
    """
    if share < warmup:
        return 0.01 + 0.99 * share / warmup
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


# --- what is held out --------------------------------------------------------------------------


def hold_out(labels: Codes, groups: Codes, share: float, seed: int, fold: int = 0) -> Codes:
    """Return the rows to hold out: whole groups where a label has two, else single photos.

    Of each label's groups, drawn in an order of their own, every ``1 / share``-th from ``fold`` on
    is held out, but never all of them; of its photos, where it has one group. With 0 none are.
    """
    if not share:
        return np.zeros(0, np.int64)
    every = max(2, round(1 / share))
    rng = np.random.default_rng(seed)
    found: list[Codes] = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        kinds = rng.permutation(np.unique(groups[rows]))
        if len(kinds) > 1:
            start = fold % min(every, len(kinds))
            found.append(rows[np.isin(groups[rows], kinds[start::every])])
        else:
            found.append(rng.permutation(rows)[fold % every :: every][: len(rows) - 1])
    return np.sort(np.concatenate(found))


def thin(rows: Codes, groups: Codes, most: int, seed: int) -> Codes:
    """Return at most about so many of the rows, of each group as many as of every other."""
    rng = np.random.default_rng(seed)
    kinds = np.unique(groups[rows])
    share = max(1, most // max(1, len(kinds)))
    found = [rng.permutation(rows[groups[rows] == kind])[:share] for kind in kinds]
    return np.sort(np.concatenate(found)) if found else rows


# --- how it is judged --------------------------------------------------------------------------


def figures(logits: npt.NDArray[np.float32], labels: Codes, groups: Codes) -> dict[str, float]:
    """Return accuracy over photos, and accuracy and loss as means over groups."""
    if not len(labels):
        return {}
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
    right = logits.argmax(axis=1) == labels
    weight = 1 / np.bincount(groups)[groups]
    return {
        "accuracy": round(float(right.mean()), 5),
        "accuracy_by_group": round(float(np.average(right, weights=weight)), 5),
        "loss": round(float(np.average(losses, weights=weight)), 5),
    }


def order(about: Mapping[str, Any]) -> tuple[float, float]:
    """Return what the better of two looks has more of."""
    return (about.get("accuracy_by_group", -1.0), -about.get("loss", math.inf))
