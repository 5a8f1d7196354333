"""Training from a folder: steps, evaluations and checkpoints to the end of the plan. Needs torch.

A resumed run does what it would have done without the break. Runs on workers, too.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch.nn import functional

from pomona.core.cpus import available_cpus
from pomona.core.errors import JobError
from pomona.core.files import read_json, write_json
from pomona.finetune import checkpoint
from pomona.finetune.batches import World
from pomona.finetune.checkpoint import Training, copy_of
from pomona.finetune.dataset import JOB, START, TEACHER, Codes, Dataset, load_dataset
from pomona.finetune.learner import Learner, head_sizes
from pomona.finetune.network import Network, features_of
from pomona.finetune.recipe import Plan, Progress, Recipe

CHECKPOINT = "checkpoint.safetensors"
PROGRESS = "progress.json"
"""Where several processes leave what one tells its ``on_step``."""
STOP = "stop"
"""A file that ends several processes: a signal reaches the driver alone."""

SAVE_EVERY = 60.0
"""Seconds between checkpoints: what a kill costs at most."""
EVALUATIONS = 20
"""Number of evaluations over the whole plan."""
PATIENCE = 10
"""Evaluations without a better one after which a run ends early. Many, as accuracy on varieties
never seen drops for a while when learning rates are at their peak."""

OnStep = Callable[[int, int], None]
"""Called with (photos trained on so far, about how many there will be)."""


def train(
    folder: Path, device: str, world: World | None = None, on_step: OnStep | None = None
) -> None:
    """Train as a folder's ``job.json`` says, and leave the result in its checkpoint.

    Resumes from the checkpoint that is there. `pomona.pipeline.finetune` fills the folder. Each
    process maps the photos; the first one writes. ``device`` is ``cpu``, ``cuda`` or ``cuda:1``.
    """
    world = world or World()
    if world.size == 1:
        torch.set_num_threads(_threads())  # what ran before may have left another number
    torch.backends.cudnn.deterministic = True  # so that the seed decides on a GPU, too
    training = _open(folder, device, world)
    learner, plan, progress = training.learner, training.plan, training.progress
    saved = time.monotonic()
    while not progress.ended:
        evaluated = int(plan.share * EVALUATIONS)
        step(training)
        due = int(plan.share * EVALUATIONS) > evaluated and not learner.blockwise(plan.share)
        if due:
            evaluate(training)
        progress.ended = _why_ended(training)
        stop = world.size > 1 and (folder / STOP).exists()
        late = bool(world.agree(stop or time.monotonic() - saved > SAVE_EVERY))
        if world.rank == 0 and (due or late):
            checkpoint.save(folder / CHECKPOINT, training)
        if late:
            saved = time.monotonic()
        if on_step:
            done = progress.step * learner.recipe.batch_size
            on_step(done, round(done / max(plan.share, 1e-9)))
        if world.agree(stop):
            return


def train_together(folder: str) -> None:
    """Train as one of several processes that torch's launcher has started. Runs on workers."""
    path = Path(folder)
    if not (path / JOB).exists():
        raise JobError(f"{folder} isn't seen here: --processes needs an OUT that all share")
    cuda = read_json(path / JOB)["device"] == "cuda"
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
        if cuda:
            torch.cuda.set_device(device)

        def on_step(done: int, total: int) -> None:
            write_json(path / PROGRESS, {"done": done, "total": total})

        train(path, device, World(rank, size, device), on_step if rank == 0 else None)
    finally:
        torch.distributed.destroy_process_group()


def load_result(folder: Path, device: str) -> tuple[Network, Progress, float]:
    """Return the best network so far, the training's progress, and the seconds it took."""
    recipe = Recipe(**read_json(folder / JOB)["recipe"])
    plan, progress, parts = checkpoint.read(folder / CHECKPOINT, device)
    network = Network(head_sizes(recipe, load_dataset(folder)), norm=recipe.norm).to(device)
    network.load_state_dict(parts["best"])
    return network, progress, plan.spent


def _open(folder: Path, device: str, world: World) -> Training:
    """Begin a training, or resume it."""
    began = time.monotonic()
    job = read_json(folder / JOB)
    learner = Learner(
        Recipe(**job["recipe"]),
        load_dataset(folder),
        load_file(folder / START),
        teacher=load_file(folder / TEACHER) if (folder / TEACHER).exists() else None,
        device=device,
        world=world,
    )
    plan = Plan(job["steps"], job["seconds"])
    if world.agree((folder / CHECKPOINT).exists()):
        training = Training(learner, plan)
        checkpoint.restore(folder / CHECKPOINT, training)
        return training
    if job["trained"]:
        learner.initialise_heads()
    training = Training(learner, plan)
    if job["trained"]:
        evaluate(training)
        training.progress.before = training.progress.best
    plan.spent = time.monotonic() - began  # it is part of the time asked for
    if world.rank == 0:
        checkpoint.save(folder / CHECKPOINT, training)
    return training


def step(training: Training) -> None:
    """Take a step, and move the average and the plan."""
    began = time.monotonic()
    learner, progress, plan = training.learner, training.progress, training.plan
    loss = learner.step(progress.step, plan.share)
    progress.step += 1
    progress.losses.append(round(loss, 5))
    training.average.update(learner.network, progress.step, plan.share)
    plan.advance(time.monotonic() - began)
    plan.share = learner.world.agree(plan.share)
    if not math.isfinite(loss):
        raise JobError(
            f"the loss is no number any more at step {progress.step}: remove the run's folder "
            "and start again with --precision float32, another --seed, or other weights"
        )


def evaluate(training: Training) -> None:
    """Evaluate the result so far on what is held out, and keep it if it is the best."""
    began = time.monotonic()
    learner, progress = training.learner, training.progress
    network, world, held_out = learner.network, learner.world, learner.dataset.held_out
    states = (network.state_dict(), training.average.weights)
    world.mean([value for state in states for key, value in state.items() if "running_" in key])
    result = training.average.result()
    metrics: dict[str, float] = {}
    if world.rank == 0:
        trained = copy_of(network.state_dict())
        network.load_state_dict(result)
        metrics = metrics_of(network, learner.dataset, held_out, learner.device)
        network.load_state_dict(trained)
    entry = {
        "step": progress.step,
        "share": round(training.plan.share, 4),
        "seconds": round(training.plan.spent, 1),
        "training_loss": round(float(np.mean(progress.losses[-50:] or [0.0])), 4),
        **metrics,
    }
    progress.history.append(entry)
    if world.agree(sort_key(entry) > sort_key(progress.best) or not len(held_out)):
        progress.best, training.best = entry, result
    training.plan.spent += time.monotonic() - began


def metrics_of(network: Network, dataset: Dataset, rows: Codes, device: str) -> dict[str, float]:
    """Return the accuracy over photos, and accuracy and cross-entropy as means over groups.

    Rows of the dataset are taken without augmentation; without rows there are no metrics.
    """
    if not len(rows):
        return {}
    features = features_of(network, dataset.photos, rows, device)
    with torch.inference_mode():
        logits = network.heads["label"](features).cpu()
    labels, groups = torch.from_numpy(dataset.labels[rows]), dataset.groups[rows]
    right = (logits.argmax(dim=1) == labels).numpy()
    losses = functional.cross_entropy(logits, labels, reduction="none").numpy()
    weight = 1 / np.bincount(groups)[groups]
    return {
        "accuracy": round(float(right.mean()), 5),
        "accuracy_by_group": round(float(np.average(right, weights=weight)), 5),
        "loss": round(float(np.average(losses, weights=weight)), 5),
    }


def sort_key(evaluation: Mapping[str, Any]) -> tuple[float, float]:
    """Return the sort key of evaluations: higher accuracy by group, then lower loss."""
    return (evaluation.get("accuracy_by_group", -1.0), -evaluation.get("loss", math.inf))


def _why_ended(training: Training) -> str:
    """Return why a training is over; empty while it isn't."""
    if training.plan.share >= 1:
        return "planned"
    steps = [entry["step"] for entry in training.progress.history]
    best = training.progress.best
    since_best = len(steps) - 1 - steps.index(best["step"]) if best else 0
    return "early" if since_best >= PATIENCE else ""


def _threads() -> int:
    """Return how many threads to use. The order of sums, and so the result, depends on it."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(asked)) if asked.isdecimal() else available_cpus()
