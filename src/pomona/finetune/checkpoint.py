"""The state of a training, with the moving average of its weights, and its checkpoints.

A checkpoint is one safetensors file with JSON in it. Needs torch. Runs on workers, too.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pomona.core.files import atomic_file
from pomona.finetune.learner import Learner
from pomona.finetune.network import Network, Tensors
from pomona.finetune.recipe import Plan, Progress, Recipe

METADATA = "pomona"
PARTS = ("network", "average", "best", "start", "optimizer")
"""Key of the file's metadata, and prefixes of its tensors' names."""


class MovingAverage:
    """The averaged weights, and the ``start`` that the result stays near."""

    def __init__(self, network: Network, recipe: Recipe) -> None:
        self.recipe = recipe
        self.start = copy_of(network.state_dict())
        self.weights = copy_of(self.start)

    def update(self, network: Network, step: int, share: float) -> None:
        """Move the average towards the network's weights after ``step`` steps.

        An exponential moving average with the horizon `Recipe.average`; in the first steps, which
        are fewer than the horizon, a plain mean. ``share`` of the schedule was done before the last
        step.
        """
        horizon = max(1.0, self.recipe.average * step / max(share, 1e-9))
        weight = 1 / min(horizon, 1 + step)
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                self.weights[key].lerp_(value, weight)
            else:
                self.weights[key].copy_(value)

    def result(self) -> Tensors:
        """Return what training has led to: weights between start and average, `Recipe.blend`."""
        blend = self.recipe.blend
        if blend == 1:
            return copy_of(self.weights)
        return {k: torch.lerp(self.start[k], value, blend) for k, value in self.weights.items()}


def copy_of(state: Tensors) -> Tensors:
    """Return a state dict with tensors of its own."""
    return {key: value.detach().clone() for key, value in state.items()}


class Training:
    """A training under way: all that steps and evaluations change, so all that a checkpoint holds.

    ``best`` are the weights that ``progress.best`` is about.
    """

    def __init__(self, learner: Learner, plan: Plan) -> None:
        self.learner, self.plan, self.progress = learner, plan, Progress()
        self.average = MovingAverage(learner.network, learner.recipe)
        self.best = self.average.result()


def save(path: Path, training: Training) -> None:
    """Write a checkpoint."""
    learner = training.learner
    parts = {
        "network": learner.network.state_dict(),
        "average": training.average.weights,
        "best": training.best,
        "optimizer": {
            f"{key}/{name}": value
            for name, parameter in learner.network.named_parameters()
            for key, value in learner.optimizer.state.get(parameter, {}).items()
        },
    }
    if training.average.recipe.blend < 1:
        parts["start"] = training.average.start
    tensors = {
        f"{part}/{key}": value.detach().contiguous()
        for part, values in parts.items()
        for key, value in values.items()
    }
    metadata = {"plan": vars(training.plan), "progress": vars(training.progress)}
    with atomic_file(path) as file:
        save_file(tensors, file, {METADATA: json.dumps(metadata)})


def restore(path: Path, training: Training) -> None:
    """Resume from a checkpoint. The plan keeps its length: it is the one asked for now."""
    learner = training.learner
    plan, training.progress, parts = read(path, learner.device)
    training.plan = replace(plan, steps=training.plan.steps, seconds=training.plan.seconds)
    learner.network.load_state_dict(parts["network"])
    training.average.weights, training.best = parts["average"], parts["best"]
    training.average.start = parts["start"] or training.average.start
    moments = parts["optimizer"]
    for name, parameter in learner.network.named_parameters():
        if f"step/{name}" in moments:
            # In the parameter's memory format, or AdamW takes another code path, with other sums.
            learner.optimizer.state[parameter] = {
                "step": moments[f"step/{name}"].cpu(),
                "exp_avg": torch.empty_like(parameter).copy_(moments[f"exp_avg/{name}"]),
                "exp_avg_sq": torch.empty_like(parameter).copy_(moments[f"exp_avg_sq/{name}"]),
            }


def read(path: Path, device: str) -> tuple[Plan, Progress, dict[str, Tensors]]:
    """Return a checkpoint's plan, progress, and its tensors by what they belong to."""
    parts: dict[str, Tensors] = {name: {} for name in PARTS}
    with safe_open(path, "pt", device=device) as file:
        metadata = json.loads(file.metadata()[METADATA])
        for name in file.keys():  # noqa: SIM118 - not a mapping
            part, key = name.split("/", 1)
            parts[part][key] = file.get_tensor(name)
    return Plan(**metadata["plan"]), Progress(**metadata["progress"]), parts


def read_progress(path: Path) -> Progress:
    """Return a checkpoint's progress; where there is none, that of a training yet to begin."""
    return read(path, "cpu")[1] if path.exists() else Progress()
