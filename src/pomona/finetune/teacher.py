"""Distillation: the network whose features are to be matched. Needs torch. Runs on workers, too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from pomona.backbone import mobilenet
from pomona.finetune.batches import Batches, World
from pomona.finetune.network import Targets, build, pooled

SAMPLE_BATCHES = 8
"""Batches by which the spread of the teacher's outputs is measured."""


class Teacher:
    """A frozen network whose features are the target; none of its tensors is in the trained one.

    Targets of blocks are rotated at random in the space of their channels: so a block that learned
    to do exactly what the teacher's block does still has other values. Features are not rotated.
    """

    def __init__(self, state: mobilenet.State, batches: Batches) -> None:
        self.network = build(state, {}, norm=False).to(batches.device).eval()
        recipe = batches.recipe
        self.mixed = recipe.mixed
        self.rotations = _rotations(recipe.seed, batches.device) if recipe.apart else []
        of_features: list[torch.Tensor] = []
        of_blocks: dict[int, list[torch.Tensor]] = {}
        for n in range(SAMPLE_BATCHES):
            _, pixels = batches.batch(-1 - n, World())
            features, targets = self.targets(pixels, blockwise=True)
            of_features.append(_moments(features))
            for block, target in enumerate(targets):
                if target is not None:
                    of_blocks.setdefault(block, []).append(_moments(target))
        self.scale = _scale(of_features)
        self.scales = {block: _scale(moments) for block, moments in of_blocks.items()}

    def targets(self, pixels: torch.Tensor, *, blockwise: bool) -> tuple[torch.Tensor, Targets]:
        """Return the features of these pixels and, with ``blockwise``, the blocks' targets."""
        autocast = torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.mixed)
        with torch.no_grad(), autocast:
            maps = self.network.maps(pixels)
            rotated = [
                None if rotation is None else functional.conv2d(output, rotation)
                for output, rotation in zip(maps, self.rotations if blockwise else (), strict=False)
            ]
            return pooled(maps), rotated

    def distance(self, maps: Sequence[torch.Tensor], features: torch.Tensor) -> torch.Tensor:
        """Return how far the maps' features are from the target, in its standard deviations."""
        return _distance(pooled(maps), features, self.scale)

    def block_distance(self, maps: Sequence[torch.Tensor], targets: Targets) -> torch.Tensor:
        """Return how far the blocks' outputs are from their targets, summed over the blocks."""
        distances = [
            _distance(maps[block], target, self.scales[block])
            for block, target in enumerate(targets)
            if target is not None
        ]
        return torch.stack(distances).sum()


def _rotations(seed: int, device: str) -> list[torch.Tensor | None]:
    """Return a random orthogonal matrix for each block's output, as a convolution [c, c, 1, 1].

    Residual blocks share that of the block before. None for blocks of a single convolution, which
    end in an activation: that doesn't commute with a rotation.
    """
    rng = np.random.default_rng(seed)
    rotations: list[torch.Tensor | None] = []
    for block in mobilenet.blocks():
        if len(block.convs) == 1:
            rotations.append(None)
        elif block.residual:
            rotations.append(rotations[-1])
        else:
            width = block.convs[-1].outputs
            q, _ = np.linalg.qr(rng.normal(size=(width, width)))
            rotations.append(torch.tensor(q[:, :, None, None], dtype=torch.float32, device=device))
    return rotations


def _moments(values: torch.Tensor) -> torch.Tensor:
    """Return each channel's mean and mean square: [2, 1, c] or [2, 1, c, 1, 1]."""
    dim = tuple(d for d in range(values.ndim) if d != 1)
    x = values.double()
    return torch.stack([x.mean(dim=dim, keepdim=True), x.square().mean(dim=dim, keepdim=True)])


def _scale(moments: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return each channel's standard deviation, plus a floor for channels that hardly vary."""
    mean, square = torch.stack(list(moments)).mean(dim=0)
    std: torch.Tensor = (square - mean.square()).clamp(min=0).sqrt().float()
    return std + 0.1 * std.mean()


def _distance(output: torch.Tensor, target: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return functional.smooth_l1_loss(output.float() / scale, target.float() / scale)
