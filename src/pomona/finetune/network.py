"""The network that is trained: the backbone and its heads. Needs torch. Runs on workers, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pomona.backbone import mobilenet
from pomona.backbone.mobilenet_torch import MobileNetV2
from pomona.core.schema import FEATURES
from pomona.finetune.dataset import Codes

Tensors = dict[str, torch.Tensor]
"""A state dict."""

Targets = Sequence[torch.Tensor | None]
"""For each block the output it should have; None where it isn't told."""

EVALUATION_BATCH = 64


class Network(nn.Module):
    """Pixels in 0…1 to features, and a linear head for each classification.

    ``classes`` has the number of classes of each head; ``norm`` is as in `Recipe`.
    """

    def __init__(self, classes: Mapping[str, int], *, norm: bool) -> None:
        super().__init__()
        self.norm = norm
        self.backbone = MobileNetV2(norm=norm)
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, n) for name, n in classes.items()})
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)
        self.mean: torch.Tensor
        self.std: torch.Tensor
        for name, value in (("mean", mobilenet.MEAN), ("std", mobilenet.STD)):
            buffer = torch.tensor(value).reshape(3, 1, 1)
            self.register_buffer(name, buffer, persistent=False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return features [n, 1280] of pixels [n, 3, h, w]."""
        return pooled(self.maps(pixels))

    def maps(self, pixels: torch.Tensor, targets: Targets | None = None) -> list[torch.Tensor]:
        """Return the output of each block, [n, channels, h, w].

        The input of a block is the output of the one before it, or that one's target if it has one.
        """
        x = ((pixels - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        outputs: list[torch.Tensor] = []
        for number, block in enumerate(self.backbone.features):
            outputs.append(block(x))
            target = targets[number] if targets else None
            x = outputs[-1] if target is None else target
        return outputs


def pooled(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the features, float32 [n, 1280]: the last of `Network.maps`, averaged over pixels."""
    return maps[-1].float().mean(dim=(2, 3))


def build(state: mobilenet.State, classes: Mapping[str, int], *, norm: bool) -> Network:
    """Return a network whose features are those of the given weights; its heads are zero."""
    network = Network(classes, norm=norm)
    tensors = state if norm else mobilenet.folded(state)
    network.backbone.load_state_dict(
        {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}, strict=False
    )
    return network


def weights_of(network: Network) -> dict[str, Any]:
    """Return the backbone's weights, float32, as of `mobilenet.shapes`: batch norms unfolded."""
    state = {
        key: value.detach().cpu().contiguous().numpy()
        for key, value in network.backbone.state_dict().items()
    }
    return mobilenet.check(state if network.norm else mobilenet.unfolded(state), "the result")


@torch.inference_mode()
def features_of(
    network: Network, photos: npt.NDArray[np.uint8], rows: Codes, device: str
) -> torch.Tensor:
    """Return features [n, 1280] of rows of `Dataset.photos`, without augmentation."""
    network.eval()
    features = []
    for start in range(0, len(rows), EVALUATION_BATCH):
        rgb = photos[rows[start : start + EVALUATION_BATCH], :, :, :3]
        pixels = torch.from_numpy(rgb).to(device).permute(0, 3, 1, 2).float() / 255
        features.append(network(pixels))
    return torch.cat(features) if features else torch.zeros(0, FEATURES, device=device)
