"""`BackboneSpec`: everything that determines the features. Made on the driver, picklable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pomona.backbone import mobilenet
from pomona.backbone.onnx_file import check_onnx, try_network
from pomona.backbone.session import gpu_memory
from pomona.backbone.weights import Weights, pack
from pomona.core.errors import MissingError, RequestError
from pomona.core.schema import FEATURES
from pomona.photos.decoding import MAX_DECODED
from pomona.photos.isolation import Guard

CPU_BATCH = 8
"""ONNX Runtime gains nothing from larger batches on a CPU."""
GPU_BATCH = 128

Runner = Callable[[npt.NDArray[np.uint8]], list[npt.NDArray[np.float32]]]
"""From uint8 [n, h, w, 3] to the spec's outputs in their order, float32 [n, …] each."""


@dataclass(frozen=True)
class BackboneSpec:
    """Everything that determines the features, and how they are computed. Picklable, hashable.

    Attributes
    ----------
    weights, digest
        The weights' name and the sha256 of their values.
    image_size
        Side of the square that a photo is stretched to, in pixels.
    backend, device
        ``onnx`` or ``torch``; ``cpu`` or ``cuda``.
    precision
        ``float32``, or ``mixed`` (float16 convolutions) on a GPU with torch.
    batch_size
        Photos per call of the network.
    threads
        CPU threads of one worker: one per task slot.
    memory_share, gpu
        Share of a GPU's memory that one worker may take; which GPU, where there are several.
    guard
        How photos that crash or stall the decoder are contained (`pomona.photos.isolation`).
    pixels
        Pixels that may be decoded (`pomona.photos.decoding.decode`).
    seconds
        For one photo in a child process; None: as `pomona.photos.isolation.patience` says.
    outputs
        What `extract` returns for each photo: ``features``, or outputs of a model's file
        (`pomona.model.artifact`).
    payload
        The weights' bytes: an ONNX file, or safetensors for torch.
    """

    weights: str
    digest: str
    image_size: int = 224
    backend: str = "onnx"
    device: str = "cpu"
    precision: str = "float32"
    batch_size: int = CPU_BATCH
    threads: int = 1
    memory_share: float = 1.0
    gpu: int = 0
    guard: Guard = field(default="", compare=False)  # not part of the network
    pixels: int = field(default=MAX_DECODED, compare=False)
    seconds: float | None = field(default=None, compare=False)
    outputs: tuple[str, ...] = (mobilenet.OUTPUT,)
    payload: bytes = field(default=b"", repr=False, compare=False)

    def fingerprint(self) -> dict[str, object]:
        """Return what must be equal for the features of two tables to be comparable."""
        return {
            "weights_digest": self.digest,
            "backend": self.backend,
            "precision": self.precision,
            "preprocessing": mobilenet.preprocessing(self.image_size),
        }


def make_spec(
    weights: Weights,
    *,
    image_size: int = 224,
    backend: str = "onnx",
    device: str = "auto",
    batch_size: int | None = None,
    elsewhere: bool = False,
) -> BackboneSpec:
    """Combine weights, backend and device. Runs on the driver.

    With ``elsewhere`` the GPUs are the workers': this machine needs none.

    Raises
    ------
    RequestError
        If an option is out of range, or weights and backend don't fit.
    MissingError
        If the backend or the device isn't there.
    """
    if not 32 <= image_size <= 1024:
        raise RequestError(f"--image-size is 32 to 1024 pixels, not {image_size}")
    if backend not in ("onnx", "torch"):
        raise RequestError(f"--backend is onnx or torch, not {backend}")
    if batch_size is not None and batch_size < 1:
        raise RequestError(f"a batch holds at least one photo, not {batch_size}")
    device = find_device(backend, device, elsewhere=elsewhere)
    return BackboneSpec(
        weights=weights.name,
        digest=weights.digest,
        image_size=image_size,
        backend=backend,
        device=device,
        precision="mixed" if backend == "torch" and device == "cuda" else "float32",
        batch_size=batch_size or (GPU_BATCH if device == "cuda" else CPU_BATCH),
        payload=_payload(weights, backend, image_size),
    )


def find_device(backend: str, device: str, *, elsewhere: bool = False) -> str:
    """Return ``cpu`` or ``cuda`` for ``auto``, ``cpu`` or ``cuda``; errors as of `make_spec`."""
    if device not in ("auto", "cpu", "cuda"):
        raise RequestError(f"--device is auto, cpu or cuda, not {device}")
    if device == "cpu":
        return "cpu"
    seen = elsewhere or _sees_cuda(backend)
    if device == "cuda" and not seen:
        raise MissingError(
            f"--device cuda: {backend} sees no CUDA device here; install a CUDA build "
            "(torch, or onnxruntime-gpu in place of onnxruntime), or use --device cpu"
        )
    return "cuda" if seen else "cpu"


def _sees_cuda(backend: str) -> bool:
    if backend == "torch":
        try:
            from pomona.backbone.mobilenet_torch import cuda_devices
        except ImportError as error:
            raise MissingError(
                "--backend torch needs PyTorch: pip install 'pomona[torch]', or use --backend onnx"
            ) from error
        return cuda_devices() > 0
    from onnxruntime import get_available_providers

    # The list holds what onnxruntime was compiled with, also where there is no GPU.
    return "CUDAExecutionProvider" in get_available_providers() and gpu_memory() > 0


def _payload(weights: Weights, backend: str, image_size: int) -> bytes:
    if weights.onnx is not None:
        if backend == "torch":
            raise RequestError(f"{weights.name} is ONNX: use --backend onnx")
        check_onnx(weights.onnx, weights.name)
        try_network(weights.onnx, image_size, {mobilenet.OUTPUT: (FEATURES,)}, weights.name)
        return weights.onnx
    if backend == "torch":
        return pack(weights)
    assert weights.state is not None
    return mobilenet.to_onnx(weights.state, image_size, weights.name, weights.digest)


def onnx_file(spec: BackboneSpec) -> bytes:
    """Return the ONNX file of a spec's backbone, whatever its backend."""
    if spec.backend == "onnx":
        return spec.payload
    from safetensors.numpy import load as load_safetensors

    state = load_safetensors(spec.payload)
    return mobilenet.to_onnx(state, spec.image_size, spec.weights, spec.digest)
