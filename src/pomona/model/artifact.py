"""The model: one folder that takes a photo to an answer, with the same file wherever it runs.

``model.onnx`` holds everything from pixels to probabilities; ``classifier.safetensors`` holds what
comes after the backbone, for NumPy; ``model.json`` says what they are.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pomona.backbone.spec import CPU_BATCH, GPU_BATCH, BackboneSpec, find_device
from pomona.core.errors import MismatchError, RequestError
from pomona.core.files import sha256, write_json
from pomona.model.classifier import Classifier
from pomona.model.head import ANSWER, OUTPUTS, Head, to_onnx
from pomona.model.unknown import Detector

FORMAT = 1
"""Of the folder. Raise it when a reader of the old one would be wrong, and keep reading the old
ones: add a branch to `load_model`, and a folder of the old format to tests/data/."""

FILES = ("model.onnx", "classifier.safetensors")
PACKAGED = Path(__file__).parents[1] / "data" / "model"
"""The model in the package: apple, cherry or tomato. benchmarks/fruits.py makes it."""


def save_model(folder: Path, backbone_file: bytes, top: Head, about: dict[str, Any]) -> None:
    """Write the folder; ``about``: what ``model.json`` says beside what this function adds."""
    from safetensors.numpy import save as to_bytes

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(to_onnx(backbone_file, top))
    tensors = {
        "mean": top.mean,
        "linear": top.linear,
        "weight": top.classifier.weight,
        "bias": top.classifier.bias,
        **{f"detector.{name}": value for name, value in top.detector.tensors.items()},
    }
    content = to_bytes({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    (folder / "classifier.safetensors").write_bytes(content)
    write_about(
        folder,
        {
            **about,
            "format": FORMAT,
            "labels": list(top.classifier.labels),
            "power": top.power,
            "components": len(top.linear),
            "temperature": top.classifier.temperature,
            "unknown": {
                **about.get("unknown", {}),
                "method": top.detector.method,
                "threshold": top.detector.threshold,
            },
            "outputs": list(OUTPUTS),
        },
    )


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write ``model.json`` with the digests of the files beside it."""
    about = {**about, "digests": {name: sha256(folder / name) for name in FILES}}
    write_json(folder / "model.json", {**about, "digest": _own_digest(about)})


def _own_digest(about: dict[str, Any]) -> str:
    """Return the digest of ``model.json`` without its own: it tells if a label was changed."""
    rest = {name: value for name, value in about.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Model:
    """A model that was read and checked.

    Attributes
    ----------
    folder
        From which it was read.
    about, content
        ``model.json``, and the bytes of ``model.onnx``.
    """

    folder: Path
    about: dict[str, Any]
    content: bytes

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the probabilities."""
        return tuple(self.about["labels"])

    @property
    def version(self) -> str:
        """The first digits of the digest of ``model.onnx``."""
        return str(self.about["digests"]["model.onnx"])[:12]

    def spec(
        self,
        outputs: tuple[str, ...] = ANSWER,
        *,
        device: str = "cpu",
        threads: int = 1,
        elsewhere: bool = False,
    ) -> BackboneSpec:
        """Return what `pomona.extract` needs to run the model; it is sent to workers.

        With ``elsewhere`` the GPUs are those of the workers, not of this machine.
        """
        device = find_device("onnx", device, elsewhere=elsewhere)
        return BackboneSpec(
            weights=str(self.about["weights"]["name"]),
            digest=self.about["digests"]["model.onnx"],
            image_size=int(self.about["preprocessing"]["image_size"]),
            device=device,
            batch_size=GPU_BATCH if device == "cuda" else CPU_BATCH,
            threads=threads,
            outputs=outputs,
            payload=self.content,
        )

    def head(self) -> Head:
        """Return what comes after the backbone, for NumPy."""
        from safetensors.numpy import load_file

        tensors: dict[str, Any] = load_file(self.folder / "classifier.safetensors")
        weight, bias = tensors.pop("weight"), tensors.pop("bias")
        mean, linear = tensors.pop("mean"), tensors.pop("linear")
        rest = {name.removeprefix("detector."): value for name, value in tensors.items()}
        about = self.about["unknown"]
        detector = Detector(about["method"], rest, about["threshold"])
        classifier = Classifier(self.labels, weight, bias, self.about["temperature"])
        return Head(self.about["power"], mean, linear, classifier, detector)


def load_model(folder: str | Path) -> Model:
    """Read a model's folder and check it. Runs no code from the files.

    Raises
    ------
    RequestError
        If there is none.
    MismatchError
        If a file is missing or was changed, or the format is newer.
    """
    folder = Path(folder).expanduser()
    about = _read_about(folder)
    for name in FILES:
        file = folder / name
        if not file.is_file():
            raise MismatchError(f"{file} is missing: copy the whole folder, or train again")
        if sha256(file) != about["digests"].get(name):
            raise MismatchError(
                f"{file} was changed or damaged: its digest isn't the one in model.json; copy the "
                "folder again, or train again"
            )
    return Model(folder, about, (folder / "model.onnx").read_bytes())


def _read_about(folder: Path) -> dict[str, Any]:
    file = folder / "model.json"
    try:
        about = dict(json.loads(file.read_bytes()))
    except FileNotFoundError:
        raise RequestError(
            f"there is no model in {folder}: pomona train --out OUT makes one in OUT/model"
        ) from None
    except (ValueError, TypeError) as error:
        raise MismatchError(f"{file} is damaged: copy the folder again, or train again") from error
    if not isinstance(number := about.get("format"), int) or number > FORMAT:
        raise MismatchError(
            f"{file} has format {number}, and this Pomona reads up to {FORMAT}: update Pomona"
        )
    if about.get("digest") != _own_digest(about):
        raise MismatchError(
            f"{file} was changed: its digest doesn't fit; copy the folder again, or train again"
        )
    return about
