"""The backbone: `BackboneSpec`, `load`, and `extract`, the one function that everything calls.

The driver makes a spec with `make_spec`; it crosses to the workers with the weights' bytes in it,
so that no shared file system and no network is needed there. A worker builds its session once per
process and keeps it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pomona import guard, mobilenet
from pomona.errors import MissingError, RequestError, WeightsError
from pomona.guard import Guard
from pomona.images import MAX_DECODED, Photo, decode
from pomona.schema import FEATURES
from pomona.weights import Weights, pack

Runner = Callable[[npt.NDArray[np.uint8]], list[npt.NDArray[np.float32]]]
"""From uint8 [n, h, w, 3] to one float32 [n, …] for each of the spec's outputs."""

CPU_BATCH = 8
"""ONNX Runtime gains nothing from larger batches on a CPU."""
GPU_BATCH = 128

SCORE = "score"
"""The output that is one number for each photo."""


@dataclass(frozen=True)
class BackboneSpec:
    """All that decides what features come out, and how they are computed. Picklable, hashable.

    Attributes
    ----------
    weights, digest
        The weights' name and the sha256 of their values.
    image_size
        Side of the square that a photo is stretched to, in pixels.
    backend
        ``onnx`` or ``torch``.
    device
        ``cpu`` or ``cuda``.
    precision
        ``float32``, or ``mixed`` (float16 convolutions) on a GPU with torch.
    batch_size
        Photos per call of the network.
    threads
        CPU threads of one worker: one per task slot.
    memory_share
        Share of a GPU's memory that one worker may take.
    gpu
        Which GPU, where there are several.
    guard
        What is done about photos that end or stall the process (`pomona.guard`).
    pixels
        Pixels that may be decoded (`pomona.images.decode`).
    outputs
        What `extract` adds for each photo: ``features``, or outputs of a model's file
        (`pomona.model`).
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
    guard: Guard = field(default="", compare=False)  # the network is the same
    pixels: int = field(default=MAX_DECODED, compare=False)
    outputs: tuple[str, ...] = (mobilenet.OUTPUT,)
    payload: bytes = field(default=b"", repr=False, compare=False)

    def fingerprint(self) -> dict[str, object]:
        """Return what must agree for two tables' features to be comparable."""
        return {
            "weights_digest": self.digest,
            "backend": self.backend,
            "precision": self.precision,
            "preprocessing": mobilenet.preprocessing(self.image_size),
        }


# --- making a spec, on the driver --------------------------------------------------------------


def make_spec(
    weights: Weights,
    *,
    image_size: int = 224,
    backend: str = "onnx",
    device: str = "auto",
    batch_size: int | None = None,
    elsewhere: bool = False,
) -> BackboneSpec:
    """Put weights, backend and device together. Runs on the driver.

    Parameters
    ----------
    elsewhere
        The GPUs are the workers', so that what this machine has says nothing.

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
    found = find_device(backend, device, elsewhere=elsewhere)
    return BackboneSpec(
        weights=weights.name,
        digest=weights.digest,
        image_size=image_size,
        backend=backend,
        device=found,
        precision="mixed" if backend == "torch" and found == "cuda" else "float32",
        batch_size=batch_size or (GPU_BATCH if found == "cuda" else CPU_BATCH),
        payload=_payload(weights, backend, image_size),
    )


def find_device(backend: str, device: str, *, elsewhere: bool = False) -> str:
    """Return ``cpu`` or ``cuda`` for ``auto``, ``cpu`` or ``cuda``.

    With ``elsewhere`` workers have GPUs, and this machine needs none.

    Raises
    ------
    RequestError
        If it is another word.
    MissingError
        If ``cuda`` isn't there.
    """
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
            from pomona.mobilenet_torch import cuda_devices
        except ImportError as error:
            raise MissingError(
                "--backend torch needs PyTorch: pip install 'pomona[torch]', or use --backend onnx"
            ) from error
        return cuda_devices() > 0
    from onnxruntime import get_available_providers

    # The providers are what was compiled in; whether there is a GPU is another question.
    return "CUDAExecutionProvider" in get_available_providers() and _gpu_memory() > 0


def _payload(weights: Weights, backend: str, image_size: int) -> bytes:
    if weights.onnx is not None:
        if backend == "torch":
            raise RequestError(f"{weights.name} is ONNX: use --backend onnx")
        _check_onnx(weights, image_size)
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


def _check_onnx(weights: Weights, image_size: int) -> None:
    assert weights.onnx is not None
    try:
        session = _session(weights.onnx, 1, "cpu", 1.0, 0)
    except Exception as error:  # onnxruntime raises its own types, not exported
        raise WeightsError(f"{weights.name} is damaged, or no ONNX file") from error
    first = session.get_inputs()[0]
    if first.type != "tensor(uint8)" or first.shape[1:] != [image_size, image_size, 3]:
        raise WeightsError(
            f"{weights.name} takes {first.type} {first.shape}; a backbone takes tensor(uint8) "
            f"[n, {image_size}, {image_size}, 3] at --image-size {image_size}"
        )
    outputs = {output.name: output.shape for output in session.get_outputs()}
    if outputs.get(mobilenet.OUTPUT, [None])[-1] != FEATURES:
        raise WeightsError(f"{weights.name} has no output named features of width {FEATURES}")


# --- running it, on workers --------------------------------------------------------------------


def _session(content: bytes, threads: int, device: str, memory_share: float, gpu: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        # The arena takes what is asked for, not the next power of two, up to this worker's share.
        cuda: dict[str, Any] = {"arena_extend_strategy": "kSameAsRequested", "device_id": gpu}
        if total := _gpu_memory():
            cuda["gpu_mem_limit"] = int(total * memory_share)
        providers.insert(0, ("CUDAExecutionProvider", cuda))
    return ort.InferenceSession(content, options, providers=providers)


def _gpu_memory() -> int:
    """Return the first GPU's memory in bytes, or 0 where nothing tells."""
    import subprocess

    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return int(told.stdout.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return 0


@functools.lru_cache(maxsize=2)
def _session_of(spec: BackboneSpec) -> Any:
    return _session(spec.payload, spec.threads, spec.device, spec.memory_share, spec.gpu)


@functools.lru_cache(maxsize=4)
def load(spec: BackboneSpec) -> Runner:
    """Build the network of a spec, once per process. Runs on workers.

    Specs that differ in their outputs alone share one session; it may be called from several
    threads at a time.

    Returns
    -------
    Runner
        From uint8 [n, image_size, image_size, 3] to the spec's outputs; ``features`` is
        float32 [n, 1280].
    """
    if spec.backend == "torch":
        from safetensors.numpy import load as load_safetensors

        from pomona.mobilenet_torch import build_runner

        state = load_safetensors(spec.payload)
        mixed = spec.precision == "mixed"
        device = f"cuda:{spec.gpu}" if spec.device == "cuda" else spec.device
        torch_runner = build_runner(state, device, mixed, spec.threads, spec.memory_share)
        return lambda image: [torch_runner(image)]
    session = _session_of(replace(spec, outputs=()))
    name = session.get_inputs()[0].name

    def run(image: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float32]]:
        return list(session.run(list(spec.outputs), {name: image}))

    return run


def extract(batches: Iterator[pa.RecordBatch], spec: BackboneSpec) -> Iterator[pa.RecordBatch]:
    """Turn photos into features: the one function of Spark, the service, predict and the tests.

    Runs on workers.

    Parameters
    ----------
    batches
        Record batches of any size with a column ``content`` (binary; null: it could not be read).
    spec
        What `make_spec` returned.

    Yields
    ------
    pa.RecordBatch
        One for each that came in, with as many rows in the same order: its columns less
        ``content``, then ``width``, ``height``, the spec's outputs (``features``: list<float32>,
        1280, or null) and ``error`` (code, or null).
    """
    for batch in batches:
        yield _with_features(batch, spec)


def _with_features(batch: pa.RecordBatch, spec: BackboneSpec) -> pa.RecordBatch:
    contents = batch.column("content")
    photos: list[Photo] = []
    parts: list[list[npt.NDArray[np.float32]]] = []
    for start in range(0, batch.num_rows, spec.batch_size):
        chunk = _decode(contents[start : start + spec.batch_size], spec)
        pixels = [photo.pixels for photo in chunk if photo.pixels is not None]
        if pixels:
            # One photo, as the service has it, isn't copied.
            parts.append(load(spec)(np.stack(pixels) if len(pixels) > 1 else pixels[0][np.newaxis]))
        photos += [photo._replace(pixels=None) for photo in chunk]
    missing = [photo.error is not None for photo in photos]
    columns = {
        "width": pa.array([photo.width for photo in photos], pa.int32()),
        "height": pa.array([photo.height for photo in photos], pa.int32()),
    }
    for number, name in enumerate(spec.outputs):
        columns[name] = _column([part[number] for part in parts], missing, name)
    columns["error"] = pa.array([photo.error for photo in photos], pa.string())
    kept = batch.drop_columns(["content"])
    fields = [pa.field(name, column.type) for name, column in columns.items()]
    return pa.RecordBatch.from_arrays(
        [*kept.columns, *columns.values()], schema=pa.schema([*kept.schema, *fields])
    )


def _column(parts: list[npt.NDArray[np.float32]], missing: list[bool], name: str) -> pa.Array:
    if name == mobilenet.OUTPUT:
        return feature_column(parts, missing, FEATURES)
    if not parts:  # no photo of this batch can be used: the width isn't known, and isn't needed
        return pa.nulls(len(missing), pa.float32() if name == SCORE else pa.list_(pa.float32()))
    if parts[0].ndim == 2:
        return feature_column(parts, missing, parts[0].shape[1])
    values = np.zeros(len(missing), np.float32)
    absent = np.asarray(missing, bool)
    values[~absent] = np.concatenate(parts)
    return pa.array(values, mask=absent if absent.any() else None)


def _decode(contents: pa.Array, spec: BackboneSpec) -> list[Photo]:
    views, size, most = contents.to_pylist(), spec.image_size, spec.pixels
    if spec.guard == "child":
        return [guard.decode_apart(view, size, most) for view in views]
    with guard.watched() if spec.guard else contextlib.nullcontext():
        if spec.threads == 1:
            return [decode(view, size, most) for view in views]
        # A GPU waits for pixels: Pillow releases the interpreter's lock while it decodes.
        return list(_pool(spec.threads).map(lambda view: decode(view, size, most), views))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def feature_column(
    parts: Sequence[npt.NDArray[np.float32]], missing: Sequence[bool], width: int = FEATURES
) -> pa.ListArray:
    """Put vectors into a list column, with null in the places of ``missing``.

    Parameters
    ----------
    parts
        float32 [m, width] each, together one row for each photo that isn't missing.
    missing
        For each photo, whether it has no features.
    width
        Of a vector.
    """
    values = np.concatenate(parts) if parts else np.zeros((0, width), np.float32)
    present = ~np.asarray(missing, bool)
    if values.shape != (present.sum(), width):
        raise ValueError(f"features of shape {values.shape} for {present.sum()} photos")
    if not np.isfinite(values).all():
        raise ValueError("the backbone gave features that are not finite: check the weights")
    offsets = np.zeros(len(present) + 1, np.int32)
    np.cumsum(present * width, out=offsets[1:])
    mask = None if present.all() else pa.array(~present)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()), mask=mask)
