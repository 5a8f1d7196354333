"""The network that learns, its teacher, and its batches. Needs torch. Runs on workers, too.

All that is random about a step depends on the seed and the step's number alone. Several processes
draw the same batch, and each does its part of it (`World`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from pomona.backbone import mobilenet
from pomona.backbone.mobilenet_torch import MobileNetV2
from pomona.core.schema import FEATURES
from pomona.finetune import augmentation
from pomona.finetune.recipe import Codes, Recipe


@dataclass(frozen=True)
class Data:
    """Photos in memory (or mapped into it) and what is known about them.

    Attributes
    ----------
    photos
        uint8 [n, side, side, 4]: RGB and the mask of `augment.cut_out`.
    labels, groups
        Codes [n]; without groups each label is one.
    train, held_out, test
        Rows.
    """

    photos: npt.NDArray[np.uint8]
    labels: Codes
    groups: Codes
    train: Codes
    held_out: Codes
    test: Codes

    @property
    def counts(self) -> dict[str, int]:
        """How many labels and groups are trained on."""
        return {
            "label": int(self.labels[self.train].max()) + 1,
            "group": int(self.groups[self.train].max()) + 1,
        }


# --- several processes -------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The processes that train together; this one is ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by the sum over the processes, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def agree(self, value: float) -> float:
        """Return the first process's value."""
        if self.size == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(told, 0)
        return float(told[0])

    def share(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by the first process's."""
        for tensor in tensors if self.size > 1 else ():
            torch.distributed.broadcast(tensor, 0)


# --- the network and its heads -----------------------------------------------------------------


Aims = Sequence[torch.Tensor | None]
"""What each block should give; None where that is its own affair."""


class Network(nn.Module):
    """Pixels in 0…1 to features, and features to the logits of each question."""

    def __init__(self, counts: Mapping[str, int], *, norm: bool) -> None:
        super().__init__()
        self.norm = norm
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
        return pooled(self.maps(pixels))

    def maps(self, pixels: torch.Tensor, given: Aims | None = None) -> list[torch.Tensor]:
        """Return what each block gives, each [n, channels, h, w]; features are the last's mean.

        Each block takes what the one before it gives, or what that one should: ``given``.
        """
        x = ((pixels - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        found: list[torch.Tensor] = []
        for block in self.backbone.features:
            found.append(block(x))
            aim = given[len(found) - 1] if given else None
            x = found[-1] if aim is None else aim
        return found


def pooled(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return features of what `Network.maps` gave: float32 [n, 1280]."""
    return maps[-1].float().mean(dim=(2, 3))


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
        draws = augmentation.draw(size, side, generator).part(world.rank, world.size)
        draws = draws.each(lambda value: value.to(self.device))
        photos = torch.from_numpy(self.data.photos[rows]).to(self.device)
        return rows, augmentation.apply(photos, draws)


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
    return torch.cat(found) if found else torch.zeros(0, FEATURES, device=device)


def logits_of(
    network: Network, photos: npt.NDArray[np.uint8], rows: Codes, device: str
) -> npt.NDArray[np.float32]:
    """Return the logits of the labels, [n, labels]."""
    features = features_of(network, photos, rows, device)
    with torch.inference_mode():
        logits: npt.NDArray[np.float32] = network.heads["label"](features).cpu().numpy()
    return logits


# --- the teacher -------------------------------------------------------------------------------


class Teacher:
    """A network whose features are the aim. None of its tensors is part of the one that learns.

    What blocks are to give is turned, at random, in the space of its channels: a block that learned
    exactly what the teacher's does would still not have its values. Features are not turned.
    """

    BATCHES = 8

    def __init__(self, state: mobilenet.State, batches: Batches) -> None:
        self.network = build(state, {}, norm=False).to(batches.device).eval()
        self.mixed = batches.recipe.mixed
        self.turns: list[torch.Tensor | None] = []
        if batches.recipe.apart:
            self.turns = _turns(batches.recipe.seed, batches.device)
        of_features: list[torch.Tensor] = []
        of_blocks: dict[int, list[torch.Tensor]] = {}
        for n in range(self.BATCHES):
            features, aims = self.aims(batches.batch(-1 - n, World())[1], apart=True)
            of_features.append(_moments(features))
            for place, aim in enumerate(aims):
                if aim is not None:
                    of_blocks.setdefault(place, []).append(_moments(aim))
        self.scale = _scale(of_features)
        self.scales = {place: _scale(moments) for place, moments in of_blocks.items()}

    def aims(self, pixels: torch.Tensor, *, apart: bool) -> tuple[torch.Tensor, Aims]:
        """Return its features of these pixels and, with ``apart``, what blocks are to give."""
        with (
            torch.no_grad(),
            torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.mixed),
        ):
            maps = self.network.maps(pixels)
            turned = [
                None if turn is None else functional.conv2d(found, turn)
                for found, turn in zip(maps, self.turns if apart else (), strict=False)
            ]
            return pooled(maps), turned

    def distance(self, maps: Sequence[torch.Tensor], features: torch.Tensor) -> torch.Tensor:
        """Return how far the features of these maps are, in its own standard deviations."""
        return _distance(pooled(maps), features, self.scale)

    def blocks(self, maps: Sequence[torch.Tensor], aims: Aims) -> torch.Tensor:
        """Return how far what the blocks give is, summed over the blocks."""
        return torch.stack(
            [
                _distance(maps[place], aim, self.scales[place])
                for place, aim in enumerate(aims)
                if aim is not None
            ]
        ).sum()


def _turns(seed: int, device: str) -> list[torch.Tensor | None]:
    """Return an orthogonal matrix for what each block gives, as a convolution [c, c, 1, 1].

    Blocks that add their input share it. None for single convolutions: a turn doesn't pass their
    activation.
    """
    rng = np.random.default_rng(seed)
    found: list[torch.Tensor | None] = []
    for block in mobilenet.blocks():
        if len(block.convs) == 1:
            found.append(None)
        elif block.residual:
            found.append(found[-1])
        else:
            width = block.convs[-1].outputs
            turn, _ = np.linalg.qr(rng.normal(size=(width, width)))
            found.append(torch.tensor(turn[:, :, None, None], dtype=torch.float32, device=device))
    return found


def _moments(values: torch.Tensor) -> torch.Tensor:
    """Return each channel's mean and mean square: [2, 1, c] or [2, 1, c, 1, 1]."""
    dim = tuple(d for d in range(values.ndim) if d != 1)
    x = values.double()
    return torch.stack([x.mean(dim=dim, keepdim=True), x.square().mean(dim=dim, keepdim=True)])


def _scale(moments: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return each channel's standard deviation, kept from 0 where a channel is all but still."""
    mean, square = torch.stack(list(moments)).mean(dim=0)
    std: torch.Tensor = (square - mean.square()).clamp(min=0).sqrt().float()
    return std + 0.1 * std.mean()


def _distance(found: torch.Tensor, aim: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return functional.smooth_l1_loss(found.float() / scale, aim.float() / scale)
