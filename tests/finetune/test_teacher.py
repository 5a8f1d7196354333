"""Distillation from a random start: the teacher is a target and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pomona.backbone import mobilenet
from pomona.finetune.batches import World
from pomona.finetune.dataset import Dataset
from pomona.finetune.learner import Learner
from pomona.finetune.network import build, pooled
from pomona.finetune.recipe import Recipe
from pomona.finetune.teacher import Teacher


def learner_of(
    dataset: Dataset,
    start: dict[str, Any],
    statistics: dict[str, Any],
    *,
    distill: float = 1.0,
    apart: float = 0.0,
    rate: float = 2e-4,
) -> tuple[Learner, Teacher]:
    recipe = Recipe(image_size=32, batch_size=8, norm=True, distill=distill, apart=apart, rate=rate)
    learner = Learner(recipe, dataset, start, teacher=statistics)
    assert learner.teacher is not None
    return learner, learner.teacher


def test_no_value_of_the_teacher_gets_in(dataset: Dataset, statistics: dict[str, Any]) -> None:
    """A random start is a function of the seed; the teacher is no part of what learns."""
    start = mobilenet.random_state(4)
    learner, teacher = learner_of(dataset, start, statistics, distill=5.0)
    alone = Learner(Recipe(image_size=32, batch_size=8, norm=True), dataset, start)
    for name, value in alone.network.state_dict().items():
        assert torch.equal(value, learner.network.state_dict()[name])
    theirs = {value.data_ptr() for value in teacher.network.state_dict().values()}
    assert not theirs & {value.data_ptr() for value in learner.network.state_dict().values()}
    learning = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert learning == {id(p) for p in learner.network.parameters()}
    before = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    for number in range(3):
        learner.step(number, number / 3)
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(value, before[name])  # it doesn't learn either
        mine = learner.network.state_dict().get(name)
        if mine is not None and mine.numel() > 1000:
            assert float((mine - value).abs().mean()) > 1e-3


def test_a_teacher_s_features_come_nearer(dataset: Dataset, statistics: dict[str, Any]) -> None:
    start = mobilenet.random_state(4)
    learner, teacher = learner_of(dataset, start, statistics, distill=5.0, rate=1e-2)
    _, pixels = learner.batches.batch(0, World())

    def distance() -> float:
        with torch.no_grad():
            features, _ = teacher.targets(pixels, blockwise=False)
            return float(teacher.distance(learner.network.maps(pixels), features))

    first = distance()
    for number in range(12):
        learner.step(number, number / 12)
    assert distance() < 0.9 * first


def test_a_block_that_does_what_the_teacher_s_does_has_not_its_values(
    dataset: Dataset, statistics: dict[str, Any]
) -> None:
    """The teacher itself, rotated as its targets are, meets them all, and shares no convolution."""
    learner, teacher = learner_of(dataset, statistics, statistics, apart=0.5)
    theirs = mobilenet.folded(statistics)
    rotated = _rotated(theirs, teacher)
    network = build(mobilenet.unfolded(rotated), {}, norm=False).eval()
    _, pixels = learner.batches.batch(0, World())
    features, targets = teacher.targets(pixels, blockwise=True)
    with torch.no_grad():
        maps = network.maps(pixels)
    assert float(teacher.distance(maps, features)) < 1e-3
    assert float(teacher.block_distance(maps, targets)) < 1e-3
    for conv in mobilenet.convs():
        if conv.groups == 1 and conv.weight not in ("features.0.0", "features.1.conv.0.0"):
            ours, its = rotated[f"{conv.weight}.weight"], theirs[f"{conv.weight}.weight"]
            cosines = (ours * its).sum(axis=(1, 2, 3)) / np.sqrt(
                (ours**2).sum(axis=(1, 2, 3)) * (its**2).sum(axis=(1, 2, 3))
            )
            assert abs(np.median(cosines)) < 0.5


def _rotated(folded: dict[str, Any], teacher: Teacher) -> dict[str, Any]:
    """Return the teacher's weights with each block's output rotated, and its input back."""
    rotated = {key: value.copy() for key, value in folded.items()}
    rotations = [None if r is None else r.numpy()[:, :, 0, 0] for r in teacher.rotations]
    for number, block in enumerate(mobilenet.blocks()):
        into = rotations[number - 1] if number else None
        if into is not None:
            name = f"{block.convs[0].weight}.weight"
            kernel = np.einsum("acij,bc->abij", rotated[name], into)
            rotated[name] = kernel.astype(np.float32)
        out, last = rotations[number], block.convs[-1].weight
        if out is not None:
            kernel = np.einsum("ab,bcij->acij", out, rotated[f"{last}.weight"])
            rotated[f"{last}.weight"] = kernel.astype(np.float32)
            rotated[f"{last}.bias"] = out @ rotated[f"{last}.bias"]
    return rotated


def test_blocks_learn_apart_first(dataset: Dataset, statistics: dict[str, Any]) -> None:
    start = mobilenet.random_state(4)
    learner, teacher = learner_of(dataset, start, statistics, apart=0.5, rate=1e-2)
    _, pixels = learner.batches.batch(0, World())
    _, targets = teacher.targets(pixels, blockwise=True)
    blocks = list(learner.network.backbone.features)

    def changed(share: float) -> list[bool]:
        """Which blocks have a gradient from what the last one gives."""
        learner.network.zero_grad()
        maps = learner.network.maps(pixels, targets if learner.blockwise(share) else None)
        pooled(maps).square().sum().backward()  # type: ignore[no-untyped-call]
        return [any(p.grad is not None for p in block.parameters()) for block in blocks]

    def distance() -> float:
        with torch.no_grad():
            return float(teacher.block_distance(learner.network.maps(pixels, targets), targets))

    assert learner.blockwise(0.0)
    assert changed(0.0) == [False] * (len(blocks) - 1) + [True]
    first = distance()
    for number in range(8):
        learner.step(number, number / 16)
    assert distance() < 0.9 * first
    assert not learner.blockwise(0.5)
    assert changed(0.5) == [True] * len(blocks)
