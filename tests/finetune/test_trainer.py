"""Training from a folder: the loop, its end, the averaged weights, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pomona.backbone import mobilenet
from pomona.core.errors import JobError
from pomona.finetune import checkpoint, trainer
from pomona.finetune.checkpoint import Training, read_progress
from pomona.finetune.dataset import Dataset
from pomona.finetune.learner import Learner
from pomona.finetune.recipe import Plan, Recipe

RECIPE = Recipe(image_size=32, batch_size=8)


def test_the_seed_decides(dataset: Dataset) -> None:
    def weights_after(seed: int) -> torch.Tensor:
        recipe = replace(RECIPE, norm=True, seed=seed)
        learner = Learner(recipe, dataset, mobilenet.random_state(4))
        for number in range(2):
            learner.step(number, number / 2)
        return torch.cat([value.flatten() for value in learner.network.state_dict().values()])

    first = weights_after(0)
    assert torch.equal(first, weights_after(0))
    assert not torch.equal(first, weights_after(1))


def test_stops_early_when_held_out_groups_say_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "PATIENCE", 2)
    monkeypatch.setattr(trainer, "sort_key", lambda entry: (-entry.get("step", 99), 0.0))
    trainer.train(folder, "cpu")
    progress = read_progress(folder / trainer.CHECKPOINT)
    assert progress.ended == "early"
    assert progress.best["step"] == 1 and progress.history[-1]["step"] == 3


def test_a_loss_that_is_no_number_ends_it(dataset: Dataset) -> None:
    state = mobilenet.random_state(0)
    state["features.0.0.weight"] = state["features.0.0.weight"] * np.float32(np.nan)
    training = Training(Learner(replace(RECIPE, norm=True), dataset, state), Plan(steps=3))
    with pytest.raises(JobError, match="no number any more at step 1"):
        trainer.step(training)


def test_the_result_lies_between_the_start_and_what_was_learned(
    dataset: Dataset, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, blend=0.75, rate=1e-2)

    def training() -> Training:
        return Training(Learner(recipe, dataset, mobilenet.random_state(4)), Plan(steps=4))

    learner = training().learner
    learner.initialise_heads()
    first = {key: value.clone() for key, value in learner.network.state_dict().items()}
    begun = Training(learner, Plan(steps=4))
    for _ in range(2):
        trainer.step(begun)
    checkpoint.save(tmp_path / "a", begun)
    resumed = training()
    checkpoint.restore(tmp_path / "a", resumed)
    trainer.evaluate(resumed)
    moved = 0.0
    for key, value in resumed.best.items():
        average = begun.average.weights[key]
        assert torch.allclose(value, 0.25 * first[key] + 0.75 * average, atol=1e-5)
        moved += float((value - first[key]).abs().sum())
    assert moved > 1
