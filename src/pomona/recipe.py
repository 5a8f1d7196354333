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
class Scene:
    """How photos are to look.

    Attributes
    ----------
    scale
        Of the photo's side: below 1 the fruit gets smaller, above 1 the photo is cropped.
    shift
        Of the side, either way.
    stretch
        The sides' ratio: at most e to this.
    brightness, contrast, saturation
        Factors are 1 ± these.
    hue
        Radians about the grey axis, either way.
    tint
        Of the light: added to each channel, ± this (1 is white).
    noise
        A sensor's: standard deviation at most.
    blurred
        Share of the photos that are blurred.
    white
        Share of the photos that keep their background.
    """

    scale: tuple[float, float] = (0.7, 1.4)
    shift: float = 0.1
    stretch: float = 0.15
    brightness: float = 0.25
    contrast: float = 0.2
    saturation: float = 0.4
    hue: float = 0.3
    tint: float = 0.05
    noise: float = 0.02
    blurred: float = 0.2
    white: float = 0.5


SCENES = {
    "phone": Scene(),  # half keep their white: there will be photos of that kind, too
    "studio": Scene(
        scale=(0.8, 1.5), stretch=0.0, contrast=0.0, tint=0.0, noise=0.0, blurred=0.0, white=1.0
    ),
}
"""As a phone takes photos; or as the training photos were taken, of fruit from other sides."""


@dataclass(frozen=True)
class Recipe:
    """How weights are trained.

    Attributes
    ----------
    scene
        How photos are made to look: one of `SCENES`.
    norm
        Whether batch norms take each batch's own statistics, as training from a random start needs.
        Otherwise they keep those that they came with: a batch of few varieties does no harm.
    rate, head_rate
        AdamW's learning rates at the top of the schedule.
    decay
        AdamW's weight decay.
    smoothing
        Share of the label that is spread over all labels.
    average
        The weights that are judged and kept are a mean of those of about so long a share of the
        run, the latest weighing most.
    variety
        Weight of the second question, which variety it is; 0 leaves it out.
    distill
        Weight of the distance to the teacher's features; 0 leaves it out. With neither, features
        come to tell labels and nothing else, and little is unknown to them any more.
    apart
        Share of the run at whose start each block learns by itself to give what the teacher's gives
        (Li et al. 2020, "Blockwisely supervised neural architecture search with knowledge
        distillation"). A random start learns much faster so.
    mixed
        Convolve in bfloat16.
    """

    image_size: int = 224
    batch_size: int = 32
    scene: str = "phone"
    norm: bool = False
    rate: float = 2e-4
    head_rate: float = 2e-3
    decay: float = 1e-2
    warmup: float = 0.02
    smoothing: float = 0.1
    average: float = 0.15
    variety: float = 0.0
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
