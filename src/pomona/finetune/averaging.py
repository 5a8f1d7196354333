"""The moving average of the weights, and the result that comes of it. Needs torch."""

from __future__ import annotations

import torch

from pomona.finetune.network import Network, Tensors
from pomona.finetune.recipe import Recipe


class MovingAverage:
    """The averaged weights, and the ``start`` that the result stays near."""

    def __init__(self, network: Network, recipe: Recipe) -> None:
        self.recipe = recipe
        self.start = copy_of(network.state_dict())
        self.weights = copy_of(self.start)

    def update(self, network: Network, step: int, share: float) -> None:
        """Move the average towards the network's weights.

        An exponential moving average with the horizon `Recipe.average`; in the first steps, which
        are fewer than the horizon, a plain mean.

        Parameters
        ----------
        step
            Number of steps taken.
        share
            Share of the schedule that was done before the last one.
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
