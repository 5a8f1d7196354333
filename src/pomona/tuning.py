"""Training the backbone: recipe, step, schedule, averaged weights, checkpoints. Needs torch.

All that is random about a step depends on the seed and the step's number alone: a run that goes on
from a checkpoint does what it would have done. Several processes draw the same batch, and each does
its part of it (`World`). Runs on the driver, or on workers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from pomona import augment, manifest, mobilenet
from pomona.mobilenet_torch import MobileNetV2
from pomona.schema import FEATURES

Tensors = dict[str, torch.Tensor]
Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Recipe:
    """How weights are trained.

    Attributes
    ----------
    norm
        Whether batch norms take each batch's own statistics, as training from a random start needs.
        Otherwise they are folded into the convolutions before training: weights that come folded
        and weights that don't are then the same, a batch of one variety does no harm, and a step
        takes a third less time on a CPU.
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
        Weight of the distance to the teacher's features; 0 leaves it out.
    mixed
        Convolve in bfloat16.
    """

    image_size: int = 224
    batch_size: int = 64
    norm: bool = False
    rate: float = 2e-4
    head_rate: float = 2e-3
    decay: float = 1e-2
    warmup: float = 0.03
    smoothing: float = 0.1
    average: float = 0.05
    variety: float = 0.5
    distill: float = 0.0
    mixed: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Data:
    """Photos in memory (or mapped into it) and what is known about them.

    Attributes
    ----------
    photos
        uint8 [n, side, side, 4]: RGB and the mask of `augment.cut_out`.
    labels, groups
        Codes [n]; without groups each label is one.
    train, held_out
        Rows.
    """

    photos: npt.NDArray[np.uint8]
    labels: Codes
    groups: Codes
    train: Codes
    held_out: Codes

    @property
    def counts(self) -> dict[str, int]:
        """How many labels and groups there are."""
        return {"label": int(self.labels.max()) + 1, "group": int(self.groups.max()) + 1}


# --- several processes -------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The processes that train together; this one is ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by the sum over the processes, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def agree(self, value: float) -> float:
        """Return the first process's value."""
        if self.size == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64)
        torch.distributed.broadcast(told, 0)
        return float(told[0])


# --- the schedule ------------------------------------------------------------------------------


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

    def advance(self, took: float) -> None:
        """Note that a step took so many seconds."""
        usual = self.typical or took
        took = min(took, 5 * usual)
        self.typical = 0.9 * usual + 0.1 * took
        self.spent += took
        ways = []
        if self.steps is not None:
            ways.append(1 / self.steps)
        if self.seconds is not None:
            left = max(0.0, self.seconds - self.spent)
            ways.append((1 - self.share) / max(1.0, left / self.typical))
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


# --- the network and its heads -----------------------------------------------------------------


class Network(nn.Module):
    """Pixels in 0…1 to features, and features to the logits of each question."""

    def __init__(self, counts: Mapping[str, int], *, norm: bool) -> None:
        super().__init__()
        self.backbone = MobileNetV2(norm=norm)
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, n) for name, n in counts.items()})
        for head in self.heads.values():
            assert isinstance(head, nn.Linear)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.mean: torch.Tensor
        self.std: torch.Tensor
        for name, value in (("mean", mobilenet.MEAN), ("std", mobilenet.STD)):
            buffer = torch.tensor(value).reshape(3, 1, 1)
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return features [n, 1280] of pixels [n, 3, h, w]."""
        x = (pixels - self.mean) / self.std
        maps: torch.Tensor = self.backbone.features(x.contiguous(memory_format=torch.channels_last))
        return maps.float().mean(dim=(2, 3))


def build(state: mobilenet.State, counts: Mapping[str, int], *, norm: bool) -> Network:
    """Return a network that gives the features that these weights give."""
    network = Network(counts, norm=norm)
    tensors = state if norm else mobilenet.folded(state)
    network.backbone.load_state_dict(
        {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}, strict=False
    )
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def weights_of(tensors: Mapping[str, torch.Tensor], *, norm: bool) -> dict[str, Any]:
    """Return a network's backbone as weights of all `mobilenet.shapes`, float32."""
    start = "backbone."
    found = {
        key[len(start) :]: value.detach().cpu().contiguous().numpy()
        for key, value in tensors.items()
        if key.startswith(start)
    }
    return mobilenet.check(found if norm else mobilenet.unfolded(found), "the result")


# --- batches -----------------------------------------------------------------------------------


class Batches:
    """The photos of each step: every variety as often as every other."""

    def __init__(self, recipe: Recipe, data: Data, device: str) -> None:
        self.recipe, self.data, self.device = recipe, data, device
        keys = data.labels[data.train] * data.counts["group"] + data.groups[data.train]
        self.kinds = [data.train[keys == key] for key in np.unique(keys)]

    def batch(self, step: int, world: World) -> tuple[Codes, torch.Tensor]:
        """Return this process's rows of a step, and their pixels as drawn, on the device."""
        size, side = self.recipe.batch_size, self.data.photos.shape[1]
        seeds = np.random.SeedSequence([self.recipe.seed, step + 1_000_000])
        rng = np.random.default_rng(seeds)
        generator = torch.Generator().manual_seed(int(seeds.generate_state(1)[0]))
        kinds = np.concatenate(
            [rng.permutation(len(self.kinds)) for _ in range(-(-size // len(self.kinds)))]
        )[:size]
        rows = np.array([rng.choice(self.kinds[kind]) for kind in kinds])[world.rank :: world.size]
        draws = augment.draw(size, side, generator).part(world.rank, world.size).to(self.device)
        photos = torch.from_numpy(self.data.photos[rows]).to(self.device)
        return rows, augment.apply(photos, draws)


# --- one run -----------------------------------------------------------------------------------


@dataclass
class Progress:
    """What a run has come to; it goes into the checkpoint as JSON."""

    step: int = 0
    best: dict[str, Any] = field(default_factory=dict)
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
        self.average = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.best = self.average
        self.optimizer = _optimizer(self.network, recipe)
        self.progress = Progress()
        self.batches = Batches(recipe, data, device)
        self.teacher = None if teacher is None else Teacher(teacher, self.batches)

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
        return float(told)

    def loss(self, pixels: torch.Tensor, rows: Codes) -> torch.Tensor:
        """Return the mean loss over these photos."""
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.recipe.mixed):
            features = self.network(pixels)
        total = features.new_zeros(())
        for name, head in self.network.heads.items():
            code = torch.from_numpy(self.codes[name][rows]).to(self.device)
            smoothing = self.recipe.smoothing
            found = F.cross_entropy(head(features), code, label_smoothing=smoothing)
            total = total + self.weights[name] * found
        if self.teacher is not None:
            total = total + self.recipe.distill * self.teacher.distance(features, pixels)
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
        """Return how the averaged weights do on photos as they are, whole groups alike."""
        kept = {k: v.clone() for k, v in self.network.state_dict().items()}
        self.network.load_state_dict(self.average)
        try:
            logits = logits_of(self.network, self.data.photos, rows, self.device)
        finally:
            self.network.load_state_dict(kept)
        return figures(logits, self.data.labels[rows], self.data.groups[rows])

    def look(self, rows: Codes) -> bool:
        """Judge, and keep the averaged weights if they are the best so far."""
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
        better = _order(about) > _order(self.progress.best) if found else False
        better = bool(self.world.agree(better))
        if better:
            self.progress.best = about
            self.best = {key: value.clone() for key, value in self.average.items()}
        return better

    def _sync(self) -> None:
        """Bring running statistics of batch norms to the processes' mean."""
        stats = [v for k, v in self.network.state_dict().items() if "running_" in k]
        self.world.add(stats)
        for value in stats:
            value /= self.world.size

    def since_best(self) -> int:
        """Return how many looks ago the best one was."""
        seen = [about["step"] for about in self.progress.history]
        return len(seen) - 1 - seen.index(self.progress.best["step"]) if self.progress.best else 0

    # --- checkpoints ---

    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write all that the rest of the run depends on: one safetensors file with JSON in it."""
        from safetensors.torch import save_file

        tensors: Tensors = {}
        parts = {"network": self.network.state_dict(), "average": self.average, "best": self.best}
        for part, state in parts.items():
            tensors.update({f"{part}/{k}": v.detach().clone().contiguous() for k, v in state.items()})
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = value.detach().clone().contiguous()
        held = {
            "plan": self.plan.__dict__,
            "progress": self.progress.__dict__,
            "about": dict(about),
        }
        with manifest.aside(path) as part_file:
            save_file(tensors, part_file, {"pomona": json.dumps(held)})

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. The plan's end is the one asked for now."""
        from safetensors import safe_open

        with safe_open(path, "pt", device=str(self.device)) as file:
            held = json.loads(file.metadata()["pomona"])
            found: dict[str, Tensors] = {"network": {}, "average": {}, "best": {}, "optimizer": {}}
            for key in file.keys():  # noqa: SIM118 - no mapping
                part, name = key.split("/", 1)
                found[part][name] = file.get_tensor(key)
        self.network.load_state_dict(found["network"])
        self.average, self.best = found["average"], found["best"]
        self.progress = Progress(**held["progress"])
        ends = {"steps": self.plan.steps, "seconds": self.plan.seconds}
        self.plan = replace(Plan(**held["plan"]), **ends)
        for name, parameter in self.network.named_parameters():
            keys = ("step", "exp_avg", "exp_avg_sq")
            state = {k: found["optimizer"].get(f"{k}/{name}") for k in keys}
            if state["step"] is not None:
                state["step"] = state["step"].cpu()
                self.optimizer.state[parameter] = state


def read_about(path: Path) -> dict[str, Any]:
    """Return the JSON in a checkpoint; empty where there is none, or none that is whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return dict(json.loads(file.metadata()["pomona"]))
    except (OSError, SafetensorError):
        return {}


def _order(about: Mapping[str, Any]) -> tuple[float, float]:
    return (about.get("accuracy", -1.0), -about.get("loss", math.inf))


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


# --- judging -----------------------------------------------------------------------------------


@torch.inference_mode()
def features_of(
    network: Network, photos: npt.NDArray[np.uint8], rows: Codes, device: str
) -> torch.Tensor:
    """Return features [n, 1280] of photos as they are."""
    network.eval()
    found = []
    for start in range(0, len(rows), 64):
        some = torch.from_numpy(photos[rows[start : start + 64], :, :, :3]).to(device)
        found.append(network(some.permute(0, 3, 1, 2).float() / 255))
    return torch.cat(found) if found else torch.zeros(0, FEATURES)


def logits_of(
    network: Network, photos: npt.NDArray[np.uint8], rows: Codes, device: str
) -> npt.NDArray[np.float32]:
    """Return the logits of the labels, [n, labels]."""
    features = features_of(network, photos, rows, device)
    with torch.inference_mode():
        logits: npt.NDArray[np.float32] = network.heads["label"](features).cpu().numpy()
    return logits


def figures(
    logits: npt.NDArray[np.float32], labels: Codes, groups: Codes
) -> dict[str, float]:
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
    run.average = {k: v.detach().clone() for k, v in run.network.state_dict().items()}


def _logistic(
    z: torch.Tensor, code: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.zeros(count, z.shape[1], device=z.device, requires_grad=True)
    bias = torch.zeros(count, device=z.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(z @ weight.T + bias, code) + 0.005 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()


# --- the teacher -------------------------------------------------------------------------------


class Teacher:
    """A network whose features are the aim. None of its tensors is part of the one that learns."""

    BATCHES = 8

    def __init__(self, state: mobilenet.State, batches: Batches) -> None:
        self.network = build(state, {}, norm=False).to(batches.device).eval()
        self.mixed = batches.recipe.mixed
        seen = [self.features(batches.batch(-1 - n, World())[1]) for n in range(self.BATCHES)]
        self.mean = torch.cat(seen).mean(dim=0)
        self.std = torch.cat(seen).std(dim=0) + 0.05

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return its features of these pixels."""
        with torch.no_grad(), torch.autocast(
            pixels.device.type, torch.bfloat16, enabled=self.mixed
        ):
            found: torch.Tensor = self.network(pixels)
        return found

    def distance(self, features: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Return how far features are from its own, in its own standard deviations."""
        aim = (self.features(pixels) - self.mean) / self.std
        return F.smooth_l1_loss((features - self.mean) / self.std, aim)
