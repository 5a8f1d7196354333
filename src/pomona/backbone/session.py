"""Sessions of ONNX Runtime."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from pomona.core.cpus import available_cpus
from pomona.core.errors import WeightsError, first_line


@functools.cache
def _errors() -> tuple[type[Exception], ...]:
    """Return what ONNX Runtime raises: types of its own, without a common base or public names."""
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    types = [value for value in vars(native).values() if isinstance(value, type)]
    # Names in a damaged file, and texts about them, may not be UTF-8.
    return (UnicodeDecodeError, *(kind for kind in types if issubclass(kind, Exception)))


@contextlib.contextmanager
def refusing(where: str) -> Iterator[None]:
    """Raise ONNX Runtime's errors of the block as a WeightsError about ``where``."""
    try:
        yield
    except _errors() as error:
        reason = first_line(error)[:200]
        raise WeightsError(f"{where} can't be run by ONNX Runtime: {reason}") from error


def onnx_session(
    content: bytes,
    threads: int = 0,
    device: str = "cpu",
    memory_share: float = 1.0,
    gpu: int = 0,
    *,
    where: str = "the network",
) -> Any:
    """Load an ONNX file; a WeightsError about ``where`` if that fails. Runs on workers.

    A call uses ``threads`` of the CPU, 0: as many as there are CPUs; on a GPU, the one numbered
    ``gpu``, the session may take ``memory_share`` of its memory.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or available_cpus()
    options.inter_op_num_threads = 1
    # Errors are raised as well as logged; a GPU's fallback to the CPU is only logged.
    options.log_severity_level = 4 if device == "cpu" else 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        # The arena grows by what is asked for, not to the next power of two, and up to this
        # worker's share.
        cuda: dict[str, Any] = {"arena_extend_strategy": "kSameAsRequested", "device_id": gpu}
        if total := gpu_memory():
            cuda["gpu_mem_limit"] = int(total * memory_share)
        providers.insert(0, ("CUDAExecutionProvider", cuda))
    with refusing(where):
        return ort.InferenceSession(content, options, providers=providers)


def gpu_memory() -> int:
    """Return the first GPU's memory in bytes, or 0 where nvidia-smi gives none."""
    import subprocess

    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return int(answer.stdout.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return 0
