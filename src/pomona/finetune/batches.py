"""The batch of each step, and the processes that share it. Needs torch. Runs on workers, too.

A batch depends on the seed and the step's number alone: a resumed run goes on with the same ones,
and each of several processes takes its part of the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pomona.finetune import augmentation
from pomona.finetune.dataset import Codes, Dataset
from pomona.finetune.recipe import Recipe


@dataclass(frozen=True)
class World:
    """The processes that train together; this one is ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def mean(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        self.sum(tensors)
        for tensor in tensors:
            tensor.div_(self.size)

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by the first process's."""
        for tensor in tensors if self.size > 1 else ():
            torch.distributed.broadcast(tensor, 0)

    def agree(self, value: float) -> float:
        """Return the first process's value."""
        agreed = torch.tensor([value], dtype=torch.float64, device=self.device)
        self.broadcast([agreed])
        return float(agreed[0])


class Batches:
    """Batches in which each variety (a label's group) is as frequent as any other."""

    def __init__(self, recipe: Recipe, dataset: Dataset, device: str) -> None:
        self.recipe, self.dataset, self.device = recipe, dataset, device
        keys = (dataset.labels * (dataset.groups.max() + 1) + dataset.groups)[dataset.train]
        self.varieties = [dataset.train[keys == key] for key in np.unique(keys)]

    def batch(self, step: int, world: World) -> tuple[Codes, torch.Tensor]:
        """Return this process's part of a batch: rows of the dataset [n], and their pixels.

        These are augmented, [n, 3, h, w], on the device.
        """
        size, side = self.recipe.batch_size, self.dataset.photos.shape[1]
        seeds = np.random.SeedSequence([self.recipe.seed, step + 1_000_000])
        rng = np.random.default_rng(seeds)
        generator = torch.Generator().manual_seed(int(seeds.generate_state(1)[0]))
        count = len(self.varieties)
        chosen = np.concatenate([rng.permutation(count) for _ in range(0, size, count)])[:size]
        rows = np.array([rng.choice(self.varieties[variety]) for variety in chosen])
        rows = rows[world.rank :: world.size]
        draws = augmentation.draw(size, side, generator).part(world.rank, world.size)
        draws = draws.map(lambda value: value.to(self.device))
        photos = torch.from_numpy(self.dataset.photos[rows]).to(self.device)
        return rows, augmentation.apply(photos, draws)
