"""Find, fetch and check weights. Runs on the driver, which sends the bytes to executors."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pomona.backbone import mobilenet
from pomona.core.errors import MissingError, WeightsError
from pomona.core.files import atomic_file, cache_folder, sha256
from pomona.core.schema import SPLITS

OFFICIAL_URL = "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth"
"""torchvision's MobileNet_V2_Weights.IMAGENET1K_V1."""

OFFICIAL_SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"
"""Of that file. Its name holds the first eight digits, which a forger could match in seconds."""

FRUITS = Path(__file__).parents[1] / "data" / "fruits.safetensors"
"""The package's own weights, float16, trained by `pomona finetune` from a random start;
benchmarks/fruits.py makes them and the model card beside them."""

TUNED_ON = "pomona.tuned_on"
"""Metadata key of a ``.safetensors`` file: the `mark` of each folder it was trained on."""

OnBytes = Callable[[int, int], None]
"""Called during a download with (bytes so far, bytes in all; 0 if unknown)."""

REMEDIES = (
    "set POMONA_WEIGHTS or --weights to a .safetensors, .pth or .onnx file, put the official file "
    "into the cache folder by hand, or take --weights random:0 (untrained) to try things out"
)


@dataclass(frozen=True)
class Weights:
    """Weights that were read and checked: either ``state`` or ``onnx`` is None."""

    name: str  # imagenet, fruits, random:SEED, or a file's name
    digest: str  # sha256 of the values (of the file, for ONNX)
    state: dict[str, npt.NDArray[np.float32]] | None = None  # the backbone's tensors
    onnx: bytes | None = None  # an ONNX file
    tuned_on: tuple[str, ...] = ()  # `mark` of each folder that `pomona finetune` trained them on

    @property
    def trained(self) -> bool:
        """Whether the values come from training."""
        return not self.name.startswith("random:")


def default() -> str:
    """Return the name of the weights to use if the user gives none."""
    return os.environ.get("POMONA_WEIGHTS") or "imagenet"


def load_weights(name: str | None = None, on_bytes: OnBytes | None = None) -> Weights:
    """Find weights by name and check them.

    The name is ``imagenet``, ``fruits``, ``random:SEED``, or the path of a ``.pth``,
    ``.safetensors`` or ``.onnx`` file; by default `default`.

    Raises
    ------
    WeightsError
        If they are missing or can't be fetched, are damaged, or are not MobileNetV2's.
    """
    name = name or default()
    if name.startswith("random:"):
        return _random(name)
    if name == "imagenet":
        return _from_state("imagenet", _read_pth(_official(on_bytes)), "the official file")
    if name == "fruits":
        return fruits(FRUITS)
    path = Path(name).expanduser()
    if not path.is_file():
        raise WeightsError(f"no weights at {name}: {REMEDIES}")
    if path.suffix == ".onnx":
        return _onnx(path.name, path.read_bytes())
    if path.suffix == ".safetensors":
        return _from_file(path.name, path, str(path))
    if path.suffix in (".pth", ".pt"):
        return _from_state(path.name, _read_pth(path), str(path))
    raise WeightsError(f"{name}: weights are a .safetensors, .pth or .onnx file")


def fruits(path: Path) -> Weights:
    """Return the weights in the package; a WeightsError if it was built without them."""
    if not path.is_file():
        raise WeightsError(f"this build of Pomona holds no weights of its own: {REMEDIES}")
    return _from_file("fruits", path, "the package's file")


def pack(weights: Weights) -> bytes:
    """Return the weights as bytes for `unpack`: an ONNX file, or safetensors."""
    if weights.onnx is not None:
        return weights.onnx
    from safetensors.numpy import save

    assert weights.state is not None
    return save(dict(weights.state))


def unpack(name: str, kind: str, content: bytes, digest: str, where: str) -> Weights:
    """Read the bytes that `pack` returned, of kind ``onnx`` or ``safetensors``. Runs no code.

    Raises
    ------
    WeightsError
        If they are damaged: the digest isn't the one that was packed. Its message names ``where``.
    """
    weights = None
    if kind == "onnx":
        weights = _onnx(name, content)
    else:
        from safetensors import SafetensorError
        from safetensors.numpy import load as from_bytes

        with contextlib.suppress(SafetensorError, WeightsError):
            weights = _from_state(name, from_bytes(content), where)
    if weights is None or weights.digest != digest:
        raise WeightsError(
            f"the weights in {where} were changed or damaged: their digest isn't the one they were "
            "saved with; copy the folder again, or save it again"
        )
    return weights


def mark(folder: str) -> str:
    """Return the digest that stands for a folder of photos in tuned weights.

    Folder names may identify people, so the name itself isn't stored. The digest is the same
    whether the source was given with or without its Training folder.
    """
    return hashlib.sha256(folder.removeprefix(f"{SPLITS[0]}/").encode()).hexdigest()[:16]


def to_bytes(state: mobilenet.State, tuned_on: Iterable[str]) -> bytes:
    """Return the ``.safetensors`` file of tuned weights; `load_weights` reads ``tuned_on`` back."""
    from safetensors.numpy import save

    return save(dict(state), {TUNED_ON: " ".join(sorted(set(tuned_on)))})


def _random(name: str) -> Weights:
    if not re.fullmatch(r"random:\d{1,9}", name):
        raise WeightsError(f"{name}: random weights are named random:SEED, for example random:0")
    return _from_state(name, mobilenet.random_state(int(name.split(":")[1])), name)


def _from_state(name: str, state: mobilenet.State, where: str) -> Weights:
    checked = mobilenet.check(state, where)
    return Weights(name, mobilenet.digest(checked), state=checked)


def _from_file(name: str, path: Path, where: str) -> Weights:
    from safetensors import safe_open

    weights = _from_state(name, _read_safetensors(path), where)
    with safe_open(path, "np") as file:
        marks = (file.metadata() or {}).get(TUNED_ON, "")
    return replace(weights, tuned_on=tuple(marks.split()))


def _onnx(name: str, content: bytes) -> Weights:
    return Weights(name, hashlib.sha256(content).hexdigest(), onnx=content)


def _read_safetensors(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except TypeError as error:  # bfloat16 and the like
        raise WeightsError(f"{path} holds a type that NumPy lacks: save it as float32") from error
    except SafetensorError as error:
        raise WeightsError(f"{path} is damaged, or no safetensors file: fetch it again") from error


def _read_pth(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    try:
        from pomona.backbone.mobilenet_torch import read_pth
    except ImportError as error:
        raise MissingError(
            f"reading {path.name} needs PyTorch: pip install 'pomona[torch]', or name a "
            ".safetensors file with --weights or POMONA_WEIGHTS"
        ) from error
    try:
        return read_pth(path.read_bytes(), str(path))
    except ValueError as error:
        raise WeightsError(f"{error}: the file is damaged, or of another kind") from error


def _official(on_bytes: OnBytes | None) -> Path:
    """Return the official file, fetched if it isn't in the cache, or is damaged there."""
    path = cache_folder() / OFFICIAL_URL.rsplit("/", 1)[-1]
    if path.is_file() and sha256(path) == OFFICIAL_SHA256:
        return path
    with atomic_file(path) as part:
        _download(OFFICIAL_URL, part, on_bytes)
        if sha256(part) != OFFICIAL_SHA256:
            raise WeightsError(
                f"what came from {OFFICIAL_URL} is not the official file (its sha256 differs): "
                "try again, or fetch it by other means and name it with --weights"
            )
    return path


def _download(url: str, to: Path, on_bytes: OnBytes | None) -> None:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer, to.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or 0)
            while chunk := answer.read(1 << 18):
                file.write(chunk)
                if on_bytes:
                    on_bytes(file.tell(), total)
    except OSError as error:  # URLError is one
        reason = getattr(error, "reason", error)
        raise WeightsError(
            f"the ImageNet weights can't be fetched ({reason}): {REMEDIES}"
        ) from error
