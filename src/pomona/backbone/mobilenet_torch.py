"""MobileNetV2 in PyTorch, with torchvision's keys, built from `mobilenet`. Needs torch."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load
from torch import nn

from pomona.backbone import mobilenet
from pomona.backbone.spec import BackboneSpec, Runner
from pomona.core.errors import MissingError


class MobileNetV2(nn.Module):
    """The backbone: float32 [n, 3, h, w], normalised, to features [n, 1280].

    With ``norm=False`` each convolution has a bias and no batch norm follows, for the weights of
    `mobilenet.folded`.
    """

    def __init__(self, *, norm: bool = True) -> None:
        super().__init__()
        self.features = nn.Sequential(*[_block(block, norm) for block in mobilenet.blocks()])

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the mean over the last convolution's positions."""
        features: torch.Tensor = self.features(image).mean(dim=(2, 3))
        return features


class InvertedResidual(nn.Module):
    """Expand, filter each channel, narrow; add the input where the shape stays."""

    def __init__(self, block: mobilenet.Block, norm: bool) -> None:
        super().__init__()
        *wide, narrow = block.convs
        layers = [_conv_norm_relu(conv, norm) for conv in wide]
        self.conv = nn.Sequential(*layers, *_layers(narrow, norm))
        self.residual = block.residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, outputs, h / stride, w / stride]."""
        y: torch.Tensor = self.conv(x)
        return x + y if self.residual else y


def _block(block: mobilenet.Block, norm: bool) -> nn.Module:
    if len(block.convs) == 1:
        return _conv_norm_relu(block.convs[0], norm)
    return InvertedResidual(block, norm)


def _conv_norm_relu(conv: mobilenet.Conv, norm: bool) -> nn.Sequential:
    return nn.Sequential(*_layers(conv, norm), nn.ReLU6(inplace=True))


def _layers(conv: mobilenet.Conv, norm: bool) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(
        conv.inputs,
        conv.outputs,
        conv.kernel,
        conv.stride,
        padding=conv.kernel // 2,
        groups=conv.groups,
        bias=not norm,
    )
    if not norm:
        return convolution, nn.Identity()
    return convolution, nn.BatchNorm2d(conv.outputs, eps=mobilenet.BN_EPSILON)


def cuda_devices() -> int:
    """Return how many CUDA devices torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def read_pth(content: bytes, where: str) -> dict[str, npt.NDArray[np.generic]]:
    """Read a ``.pth`` without running code from it (``weights_only``). Raises ValueError."""
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types on a damaged file
        raise ValueError(f"{where} can't be read as PyTorch weights") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{where} holds no state dict")
    state = loaded.get("state_dict", loaded)
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return {key: value.detach().float().numpy() for key, value in tensors.items()}


def build_runner(spec: BackboneSpec) -> Runner:
    """Return a function from uint8 [n, h, w, 3] to float32 [n, 1280]. Runs on workers.

    With mixed precision a GPU convolves in float16; the mean is taken in float32.
    """
    if spec.device == "cuda":
        if not cuda_devices():
            raise MissingError("--device cuda needs a GPU that torch sees: use --device cpu")
        device = f"cuda:{spec.gpu}"
        torch.cuda.set_per_process_memory_fraction(spec.memory_share, torch.device(device))
    else:
        device = spec.device
        torch.set_num_threads(spec.threads)
    model = MobileNetV2()
    model.load_state_dict(load(spec.payload), strict=False)
    model = model.eval().to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean = torch.tensor(mobilenet.MEAN, device=device)
    std = torch.tensor(mobilenet.STD, device=device)

    @torch.inference_mode()
    def run(image: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float32]]:
        if not image.flags.writeable:  # a single photo is passed as decoded, without a copy
            image = image.copy()
        x = torch.from_numpy(image).to(device, non_blocking=True)
        x = ((x.float() / 255 - mean) / std).permute(0, 3, 1, 2)
        with torch.autocast("cuda", torch.float16, enabled=spec.precision == "mixed"):
            maps = model.features(x)
        return [maps.float().mean(dim=(2, 3)).cpu().numpy()]

    return run
