"""One training: step, averaged weights, looks at what is held out, checkpoints. Needs torch.

A run that goes on from a checkpoint does what it would have done. Runs on the driver, or on
workers.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional

from pomona.backbone import mobilenet
from pomona.core.cpus import available_cpus
from pomona.core.errors import JobError
from pomona.core.files import atomic_file, read_json, write_json
from pomona.finetune.network import (
    Batches,
    Data,
    Network,
    Teacher,
    World,
    build,
    features_of,
    logits_of,
    pooled,
)
from pomona.finetune.recipe import Codes, Plan, Recipe, factor, figures, order

Tensors = dict[str, torch.Tensor]


@dataclass
class Progress:
    """What a run has come to; it goes into the checkpoint as JSON."""

    step: int = 0
    ended: str = ""  # why: planned, or early
    best: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)  # what trained weights were worth
    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class Run:
    """A training under way."""

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        start: mobilenet.State,
        plan: Plan,
        *,
        teacher: mobilenet.State | None = None,
        device: str = "cpu",
        world: World | None = None,
    ) -> None:
        self.recipe, self.data, self.plan, self.device = recipe, data, plan, device
        self.world = world or World()
        counts = data.counts
        if not recipe.variety or counts["group"] == counts["label"]:
            counts.pop("group")
        self.network = build(start, counts, norm=recipe.norm).to(device)
        self.codes = {"label": data.labels, "group": data.groups}
        self.weights = {"label": 1.0, "group": recipe.variety}
        self.begin()
        self.optimizer = _optimizer(self.network, recipe)
        self.progress = Progress()
        self.batches = Batches(recipe, data, device)
        self.teacher = None if teacher is None else Teacher(teacher, self.batches)

    @property
    def apart(self) -> bool:
        """Whether the blocks still learn each by itself: as a whole they are worth nothing yet."""
        return self.teacher is not None and self.plan.share < self.recipe.apart

    def begin(self) -> None:
        """Take the network as it is for the start."""
        self.start = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.average = {k: v.clone() for k, v in self.start.items()}
        self.best = self.start

    # --- a step ---

    def step(self) -> float:
        """Train on one batch, and return its loss."""
        recipe, world, progress = self.recipe, self.world, self.progress
        began = time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = group["top"] * factor(self.plan.share, recipe.warmup)
        rows, pixels = self.batches.batch(progress.step, world)
        self.network.train()
        loss = self.loss(pixels, rows) * len(rows) / recipe.batch_size
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        told = loss.detach().reshape(1)
        grads = [p.grad for p in self.network.parameters() if p.grad is not None]
        world.add([*grads, told])
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimizer.step()
        progress.step += 1
        self._average()
        progress.losses.append(round(float(told), 5))
        self.plan.advance(time.monotonic() - began)
        self.plan.share = world.agree(self.plan.share)
        if not math.isfinite(progress.losses[-1]):
            raise JobError(
                f"the loss is no number any more at step {progress.step}: remove the run's folder "
                "and start again with --precision float32, another --seed, or other weights"
            )
        return float(told)

    def loss(self, pixels: torch.Tensor, rows: Codes) -> torch.Tensor:
        """Return the mean loss over these photos."""
        aims = self.teacher.aims(pixels, apart=self.apart) if self.teacher else None
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.recipe.mixed):
            maps = self.network.maps(pixels, aims[1] if aims and self.apart else None)
        features = pooled(maps)
        total: torch.Tensor = features.new_zeros(())
        for name, head in self.network.heads.items():
            code = torch.from_numpy(self.codes[name][rows]).to(self.device)
            smoothing = self.recipe.smoothing
            found = functional.cross_entropy(head(features), code, label_smoothing=smoothing)
            total = total + self.weights[name] * found
        if self.teacher and aims:
            total = total + self.recipe.distill * self.teacher.distance(maps, aims[0])
            if self.apart:
                total = total + self.teacher.blocks(maps, aims[1])
        return total

    def _average(self) -> None:
        """Move the averaged weights towards the present ones; early on they are a plain mean."""
        horizon = max(1.0, self.recipe.average * self.progress.step / max(self.plan.share, 1e-9))
        pace = 1 / min(horizon, 1 + self.progress.step)
        for key, value in self.network.state_dict().items():
            if value.is_floating_point():
                self.average[key].lerp_(value, pace)
            else:
                self.average[key].copy_(value)

    # --- judging ---

    def judge(self, rows: Codes) -> dict[str, float]:
        """Return how the result so far does on photos as they are, whole groups alike."""
        kept = {k: v.clone() for k, v in self.network.state_dict().items()}
        self.network.load_state_dict(self.blended())
        try:
            logits = logits_of(self.network, self.data.photos, rows, self.device)
        finally:
            self.network.load_state_dict(kept)
        return figures(logits, self.data.labels[rows], self.data.groups[rows])

    def blended(self) -> Tensors:
        """Return the result so far: averaged weights, some of the way back to the start."""
        blend = self.recipe.blend
        return {
            key: torch.lerp(self.start[key], value, blend) if blend < 1 else value.clone()
            for key, value in self.average.items()
        }

    def look(self, rows: Codes) -> bool:
        """Judge, and keep the result if it is the best so far."""
        began = time.monotonic()
        self._sync()
        found = self.judge(rows) if self.world.rank == 0 else {}
        about = {
            "step": self.progress.step,
            "share": round(self.plan.share, 4),
            "seconds": round(self.plan.spent, 1),
            "training_loss": round(float(np.mean(self.progress.losses[-50:] or [0.0])), 4),
            **found,
        }
        self.progress.history.append(about)
        better = not len(rows) or order(about) > order(self.progress.best)
        better = bool(self.world.agree(better))
        if better:
            self.progress.best = about
            self.best = self.blended()
        self.plan.spent += time.monotonic() - began
        return better

    def _sync(self) -> None:
        """Bring running statistics of batch norms to the processes' mean."""
        states = (self.network.state_dict(), self.average)
        stats = [v for state in states for k, v in state.items() if "running_" in k]
        self.world.add(stats)
        for value in stats:
            value.div_(self.world.size)

    def since_best(self) -> int:
        """Return how many looks ago the best one was."""
        seen = [about["step"] for about in self.progress.history]
        return len(seen) - 1 - seen.index(self.progress.best["step"]) if self.progress.best else 0

    # --- checkpoints ---

    def save(self, path: Path) -> None:
        """Write all that the rest of the run depends on: one safetensors file with JSON in it."""
        from safetensors.torch import save_file

        tensors: Tensors = {}
        parts = {"network": self.network.state_dict(), "average": self.average, "best": self.best}
        if self.recipe.blend < 1:
            parts["start"] = self.start
        for part, state in parts.items():
            tensors.update(
                {f"{part}/{k}": v.detach().clone().contiguous() for k, v in state.items()}
            )
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = value.detach().clone().contiguous()
        held = {"plan": self.plan.__dict__, "progress": self.progress.__dict__}
        with atomic_file(path) as part_file:
            save_file(tensors, part_file, {"pomona": json.dumps(held)})

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. The plan's end is the one asked for now."""
        from safetensors import safe_open

        with safe_open(path, "pt", device=str(self.device)) as file:
            held = json.loads(file.metadata()["pomona"])
            parts = ("network", "average", "best", "start", "optimizer")
            found: dict[str, Tensors] = {part: {} for part in parts}
            for key in file.keys():  # noqa: SIM118 - no mapping
                part, name = key.split("/", 1)
                found[part][name] = file.get_tensor(key)
        self.network.load_state_dict(found["network"])
        self.average, self.best = found["average"], found["best"]
        self.start = found["start"] or self.start
        self.progress = Progress(**held["progress"])
        self.plan = replace(Plan(**held["plan"]), steps=self.plan.steps, seconds=self.plan.seconds)
        for name, parameter in self.network.named_parameters():
            keys = ("step", "exp_avg", "exp_avg_sq")
            kept = [found["optimizer"].get(f"{key}/{name}") for key in keys]
            if all(value is not None for value in kept):
                step, *means = (value for value in kept if value is not None)
                # As the parameter lies in memory, or AdamW goes another, slower way.
                laid = [torch.empty_like(parameter).copy_(value) for value in means]
                self.optimizer.state[parameter] = dict(zip(keys, [step.cpu(), *laid], strict=True))


def _optimizer(network: Network, recipe: Recipe) -> torch.optim.Optimizer:
    """Biases and batch norms don't decay: there it is no penalty on complexity."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        groups.setdefault((name.startswith("heads"), parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "top": recipe.head_rate if head else recipe.rate,
                "lr": 0.0,
                "weight_decay": recipe.decay if wide else 0.0,
            }
            for (head, wide), parameters in groups.items()
        ]
    )


def probe(run: Run, most: int = 4000) -> None:
    """Set the heads to logistic regression on the features that the weights give at the start.

    So the first steps don't distort features for the sake of heads that know nothing (Kumar et al.
    2022, "Fine-tuning can distort pretrained features"), and the first look says what the features
    were worth before.
    """
    rng = np.random.default_rng(run.recipe.seed)
    share = max(1, most // len(run.batches.kinds))
    rows = np.concatenate([rng.permutation(kind)[:share] for kind in run.batches.kinds])
    features = features_of(run.network, run.data.photos, rows, run.device).clone()
    mean, std = features.mean(dim=0), features.std(dim=0) + 1e-3
    z = (features - mean) / std
    for name, head in run.network.heads.items():
        assert isinstance(head, nn.Linear)
        code = torch.from_numpy(run.codes[name][rows]).to(run.device)
        weight, bias = _logistic(z, code, head.out_features)
        with torch.no_grad():
            head.weight.copy_(weight / std)
            head.bias.copy_(bias - (weight / std) @ mean)
    run.world.share(list(run.network.state_dict().values()))
    run.begin()


def _logistic(z: torch.Tensor, code: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.zeros(count, z.shape[1], device=z.device, requires_grad=True)
    bias = torch.zeros(count, device=z.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = functional.cross_entropy(z @ weight.T + bias, code) + 0.005 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


# --- from a folder -----------------------------------------------------------------------------

CHECKPOINT = "checkpoint.safetensors"
STOP = "stop"
"""A file in the folder that ends several processes: a signal reaches the driver alone."""

SAVE_EVERY = 60.0
"""Seconds between checkpoints: what a kill costs at most."""

LOOKS = 20
"""At what is held out, over the whole plan."""

PATIENCE = 10
"""Looks without a better one after which a run ends early: at the top of the schedule varieties
never seen fare worse for a while."""

OnStep = Callable[[Run], None]


def train(
    folder: Path, device: str, world: World | None = None, on_step: OnStep | None = None
) -> None:
    """Train as a folder's ``job.json`` says, on its photos, and leave all in its checkpoint.

    Goes on from the checkpoint that is there.

    Parameters
    ----------
    folder
        As `pomona.pipeline.finetune` fills it. Each process maps the photos; the first one writes.
    device
        ``cpu``, ``cuda`` or ``cuda:1``.
    """
    world = world or World()
    if world.size == 1:
        torch.set_num_threads(_cores())  # what ran before may have left another number
    torch.backends.cudnn.deterministic = True  # on a GPU, so that a seed decides there too
    run = _open(folder, device, world)
    saved = time.monotonic()
    held_out = run.data.held_out
    while not run.progress.ended:
        before = int(run.plan.share * LOOKS)
        run.step()
        looked = int(run.plan.share * LOOKS) > before and not run.apart
        if looked:
            run.look(held_out)
        run.progress.ended = _end(run)
        stop = world.size > 1 and (folder / STOP).exists()
        late = bool(world.agree(stop or time.monotonic() - saved > SAVE_EVERY))
        if world.rank == 0 and (looked or late):
            run.save(folder / CHECKPOINT)
        if late:
            saved = time.monotonic()
        if on_step:
            on_step(run)
        if world.agree(stop):
            return


def _cores() -> int:
    """Return how many threads to take: sums, and so results, depend on it."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal():
        return max(1, int(asked))
    return available_cpus()


def _end(run: Run) -> str:
    if run.plan.share >= 1:
        return "planned"
    return "early" if run.since_best() >= PATIENCE else ""


def _open(folder: Path, device: str, world: World) -> Run:
    began = time.monotonic()
    job = read_json(folder / "job.json")
    recipe, ends = Recipe(**job["recipe"]), Plan(job["steps"], job["seconds"])
    start = load_file(folder / "start.safetensors")
    place = folder / "teacher.safetensors"
    teacher = load_file(place) if place.exists() else None
    data = read_data(folder)
    run = Run(recipe, data, start, ends, teacher=teacher, device=device, world=world)
    if world.agree((folder / CHECKPOINT).exists()):
        run.restore(folder / CHECKPOINT)
        return run
    if job["trained"]:
        probe(run)
        run.look(data.held_out)
        run.progress.before = run.progress.best
    run.plan.spent = time.monotonic() - began  # part of the time that there is
    if world.rank == 0:
        run.save(folder / CHECKPOINT)
    return run


def read_data(folder: Path) -> Data:
    """Return the photos of a folder, mapped into memory, and what is known about them."""
    photos = np.load(folder / "photos.npy", mmap_mode="r")
    rows = load_file(folder / "rows.safetensors")
    return Data(photos, **rows)


def train_together(folder: str) -> None:
    """Train as one of several processes that torch's launcher has started. Runs on workers."""
    folder_path = Path(folder)
    if not (folder_path / "job.json").exists():
        raise JobError(f"{folder} isn't seen here: --processes needs an OUT that all share")
    cuda = read_json(folder_path / "job.json")["device"] == "cuda"
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
        if cuda:
            torch.cuda.set_device(device)
        told = folder_path / "progress.json"

        def on_step(run: Run) -> None:
            if rank == 0:
                write_json(told, progress_of(run))

        train(folder_path, device, World(rank, size, device), on_step)
    finally:
        torch.distributed.destroy_process_group()


def progress_of(run: Run) -> dict[str, float]:
    """Return how far a run is: photos seen, about how many there will be."""
    seen = run.progress.step * run.recipe.batch_size
    return {"done": seen, "total": round(seen / max(run.plan.share, 1e-9))}


def told(folder: Path) -> dict[str, Any]:
    """Return the `Progress` in a folder's checkpoint; empty where there is none."""
    from safetensors import safe_open

    if not (folder / CHECKPOINT).exists():
        return {}
    with safe_open(folder / CHECKPOINT, "np") as file:
        return dict(json.loads(file.metadata()["pomona"])["progress"])


def judge_test(folder: Path, network: Network, device: str) -> dict[str, float]:
    """Return how a network does on Test; empty where there is none."""
    data = read_data(folder)
    logits = logits_of(network, data.photos, data.test, device)
    return figures(logits, data.labels[data.test], data.groups[data.test])


def result(folder: Path, device: str) -> tuple[Network, Progress, float]:
    """Return the best network so far, what the run has come to, and the seconds it took."""
    job = read_json(folder / "job.json")
    recipe, data = Recipe(**job["recipe"]), read_data(folder)
    start = load_file(folder / "start.safetensors")
    run = Run(recipe, data, start, Plan(), device=device)
    run.restore(folder / CHECKPOINT)
    run.network.load_state_dict(run.best)
    return run.network, run.progress, run.plan.spent
