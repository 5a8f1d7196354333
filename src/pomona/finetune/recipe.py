"""How weights are trained: the recipe, a run's schedule and its progress. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from pomona.backbone.weights import Weights


@dataclass(frozen=True)
class Recipe:
    """How weights are trained. The defaults are for a start that is trained already.

    Attributes
    ----------
    norm
        Whether batch norms use each batch's own statistics, which training from a random start
        needs. Otherwise they are folded into the convolutions before training: folded and unfolded
        weights then start as the same network, a batch of few varieties does no harm, and a step
        takes a third less time on a CPU.
    rate, head_rate
        AdamW's peak learning rates, of the backbone and of the heads.
    warmup
        Share of the run in which learning rates rise.
    average
        Horizon of the moving average of the weights, as a share of the run. The averaged weights
        are evaluated and kept.
    blend
        Weight of the averaged weights when interpolating between them and the start (Wortsman et
        al. 2022, "Robust fine-tuning of zero-shot models"): weights nearer to the start do better
        on data unlike the training data.
    variety
        Loss weight of the second head, which predicts the group (the variety); 0 leaves it out.
        Without it features come to separate the labels and nothing else, and nothing looks unknown
        to them any more.
    distill
        Distillation weight: of the distance to the teacher's features; 0 leaves it out.
    apart
        Share of the run, from its start, with blockwise distillation: each block learns on its own
        to give what the teacher's block gives (Li et al. 2020, "Blockwisely supervised neural
        architecture search with knowledge distillation"). A random start learns much faster so.
    """

    image_size: int = 224
    batch_size: int = 32
    norm: bool = False
    rate: float = 2e-4
    head_rate: float = 5e-4
    decay: float = 1e-2  # AdamW's weight decay
    warmup: float = 0.1
    smoothing: float = 0.1  # of labels
    average: float = 0.15
    blend: float = 1.0
    variety: float = 0.5
    distill: float = 0.0
    apart: float = 0.0
    mixed: bool = False  # convolve in bfloat16
    seed: int = 0


DISTILL = 1.0
"""Distillation weight when fine-tuning trained weights. Unless another teacher is named, it is a
frozen copy of the start, so that features stay general."""

BLEND = 0.8
"""`Recipe.blend` when fine-tuning trained weights, unless another network is the teacher."""

FROM_TEACHER: dict[str, Any] = {"distill": 5.0, "apart": 0.6}
"""A random start learns most of what it knows from the teacher, at first block by block."""

FROM_RANDOM: dict[str, Any] = {
    "norm": True,
    "rate": 2e-3,
    "head_rate": 2e-3,
    "decay": 5e-2,
    "average": 0.05,
    "variety": 0.5,
}
"""A random start needs batch norms that follow the batch, and tolerates larger steps."""


def adapt(recipe: Recipe, start: Weights, teacher: Weights | None) -> Recipe:
    """Return the recipe with what depends on the weights it starts from and on the teacher."""
    if teacher is not None:
        recipe = replace(recipe, distill=DISTILL)
    if not start.trained:
        return replace(recipe, **FROM_RANDOM, **(FROM_TEACHER if teacher else {}))
    other_teacher = teacher is not None and teacher.digest != start.digest
    return recipe if other_teacher else replace(recipe, blend=BLEND)


WARM_UP_STEPS = 5
"""Steps whose speed says little: libraries warm up, and a pause looks like a slow machine."""
WARM_UP_SECONDS = 60.0
"""The most that one of them counts for."""


@dataclass
class Plan:
    """How far a run is, whether its length is a number of steps, of seconds, or both.

    With ``seconds`` the rest of the schedule is divided by the number of steps that the time left
    allows at the speed of the last steps; so a machine that slows down still ends in time, at the
    end of the schedule. A step that takes much longer than the last ones (the machine slept, or the
    process was paused) doesn't count in full.
    """

    steps: int | None = None
    seconds: float | None = None
    share: float = 0.0  # of the schedule, done so far
    spent: float = 0.0  # seconds
    typical: float = 0.0  # seconds of a step: a moving average
    count: int = 0  # steps so far

    def advance(self, seconds: float) -> None:
        """Count a step that took so many seconds."""
        self.count += 1
        warming_up = self.count <= WARM_UP_STEPS
        usual = min(self.typical or seconds, seconds) if warming_up else self.typical
        seconds = min(seconds, 5 * usual, WARM_UP_SECONDS if warming_up else math.inf)
        self.typical = usual if warming_up else 0.9 * usual + 0.1 * seconds
        self.spent += seconds
        increments = [] if self.steps is None else [1 / self.steps]
        if self.seconds is not None:
            left = max(0.0, self.seconds - self.spent)
            increment = (1 - self.share) / max(1.0, left / self.typical)
            increments.append(min(increment, 0.01) if warming_up and left else increment)
        self.share = min(1.0, self.share + max(increments))
        if 1 - self.share < 1e-9:
            self.share = 1.0


@dataclass
class Progress:
    """What a training has come to, as JSON."""

    step: int = 0
    ended: str = ""  # why: planned, or early
    best: dict[str, Any] = field(default_factory=dict)  # of the history
    before: dict[str, Any] = field(default_factory=dict)  # trained weights before the first step
    history: list[dict[str, Any]] = field(default_factory=list)  # evaluations
    losses: list[float] = field(default_factory=list)  # of each step


def learning_rate_factor(share: float, warmup: float) -> float:
    """Return the factor of the peak learning rates: linear warm-up, then half a cosine down.

    >>> [round(learning_rate_factor(share, 0.1), 3) for share in (0.0, 0.1, 1.0)]
    [0.01, 1.0, 0.0]
    """
    if share < warmup:
        return 0.01 + 0.99 * share / warmup
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))
