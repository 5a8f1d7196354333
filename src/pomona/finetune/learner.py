"""A step of training: batch, loss, gradients, optimizer. Needs torch. Runs on workers, too."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pomona.backbone import mobilenet
from pomona.finetune.batches import Batches, World
from pomona.finetune.dataset import Codes, Dataset
from pomona.finetune.network import build, features_of, pooled
from pomona.finetune.recipe import Recipe, learning_rate_factor
from pomona.finetune.teacher import Teacher

MAX_GRADIENT_NORM = 5.0
PROBE_PHOTOS = 4000
"""The most photos that heads are initialised on."""
PROBE_PENALTY = 0.005
"""L2 penalty of that logistic regression, on standardised features."""


class Learner:
    """The network with its optimizer, batches and teacher."""

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        start: mobilenet.State,
        *,
        teacher: mobilenet.State | None = None,
        device: str = "cpu",
        world: World | None = None,
    ) -> None:
        self.recipe, self.dataset, self.device = recipe, dataset, device
        self.world = world or World()
        self.codes = {"label": dataset.labels, "group": dataset.groups}
        self.loss_weights = {"label": 1.0, "group": recipe.variety}
        self.network = build(start, head_sizes(recipe, dataset), norm=recipe.norm).to(device)
        self.optimizer = _optimizer(self.network, recipe)
        self.batches = Batches(recipe, dataset, device)
        self.teacher = None if teacher is None else Teacher(teacher, self.batches)

    def blockwise(self, share: float) -> bool:
        """Whether blocks still learn separately: as a whole the network is worth nothing yet."""
        return self.teacher is not None and share < self.recipe.apart

    def step(self, number: int, share: float) -> float:
        """Train on one batch, and return its mean loss.

        The step's ``number``, from 0, decides the batch; the ``share`` of the schedule that is done
        decides the learning rates.
        """
        factor = learning_rate_factor(share, self.recipe.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        rows, pixels = self.batches.batch(number, self.world)
        self.network.train()
        blockwise = self.blockwise(share)
        part = self.loss(pixels, rows, blockwise=blockwise) * len(rows) / self.recipe.batch_size
        self.optimizer.zero_grad(set_to_none=True)
        part.backward()  # type: ignore[no-untyped-call]
        loss = part.detach().reshape(1)
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        self.world.sum([*gradients, loss])
        nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        return float(loss)

    def loss(self, pixels: torch.Tensor, rows: Codes, *, blockwise: bool) -> torch.Tensor:
        """Return the mean loss of these photos: classification, and distance to the teacher."""
        recipe, teacher = self.recipe, self.teacher
        if teacher:
            target_features, targets = teacher.targets(pixels, blockwise=blockwise)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=recipe.mixed):
            maps = self.network.maps(pixels, targets if teacher else None)
        features = pooled(maps)
        total: torch.Tensor = features.new_zeros(())
        for name, head in self.network.heads.items():
            code = torch.from_numpy(self.codes[name][rows]).to(self.device)
            loss = functional.cross_entropy(head(features), code, label_smoothing=recipe.smoothing)
            total = total + self.loss_weights[name] * loss
        if teacher:
            total = total + recipe.distill * teacher.distance(maps, target_features)
            if blockwise:
                total = total + teacher.block_distance(maps, targets)
        return total

    def initialise_heads(self) -> None:
        """Set the heads to logistic regression on the features that the start gives.

        So the first steps don't distort features to serve untrained heads (Kumar et al. 2022,
        "Fine-tuning can distort pretrained features"), and an evaluation before them says what the
        features are worth as they are.
        """
        rng = np.random.default_rng(self.recipe.seed)
        each = max(1, PROBE_PHOTOS // len(self.batches.varieties))
        rows = np.concatenate([rng.permutation(rows)[:each] for rows in self.batches.varieties])
        features = features_of(self.network, self.dataset.photos, rows, self.device).clone()
        mean, std = features.mean(dim=0), features.std(dim=0) + 1e-3
        standardised = (features - mean) / std
        for name, head in self.network.heads.items():
            assert isinstance(head, nn.Linear)
            code = torch.from_numpy(self.codes[name][rows]).to(self.device)
            weight, bias = _logistic_regression(standardised, code, head.out_features)
            with torch.no_grad():
                head.weight.copy_(weight / std)
                head.bias.copy_(bias - (weight / std) @ mean)
        self.world.broadcast(list(self.network.state_dict().values()))


def head_sizes(recipe: Recipe, dataset: Dataset) -> dict[str, int]:
    """Return the number of classes of each head: labels, and groups where these are others."""
    labels, groups = (
        int(codes[dataset.train].max()) + 1 for codes in (dataset.labels, dataset.groups)
    )
    alone = not recipe.variety or groups == labels
    return {"label": labels} if alone else {"label": labels, "group": groups}


def _optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return AdamW, without weight decay of biases and batch norms: it doesn't regularise those."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        groups.setdefault((name.startswith("heads"), parameter.ndim > 1), []).append(parameter)
    options = [
        {
            "params": parameters,
            "peak": recipe.head_rate if of_heads else recipe.rate,
            "lr": 0.0,
            "weight_decay": recipe.decay if decays else 0.0,
        }
        for (of_heads, decays), parameters in groups.items()
    ]
    return torch.optim.AdamW(options)


def _logistic_regression(
    features: torch.Tensor, code: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight [classes, features] and bias [classes]."""
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = functional.cross_entropy(features @ weight.T + bias, code)
        loss = loss + PROBE_PENALTY * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
