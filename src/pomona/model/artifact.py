"""The model: one folder that takes a photo to an answer, with the same file wherever it runs.

``model.onnx`` holds everything from pixels to probabilities; ``classifier.safetensors`` holds what
comes after the backbone, for NumPy; ``model.json`` says what they are.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pomona.backbone.onnx_file import MOST_BYTES
from pomona.backbone.spec import CPU_BATCH, GPU_BATCH, BackboneSpec, find_device
from pomona.core.errors import MismatchError, RequestError
from pomona.core.files import sha256, write_json
from pomona.model.classifier import Classifier
from pomona.model.head import ANSWER, OUTPUTS, Head, to_onnx
from pomona.model.unknown import Detector
from pomona.model.validation import DETECTOR, check_about, check_network, read_tensors

FORMAT = 1
"""Of the folder. Raise it when a reader of the old one would be wrong, and keep reading the old
ones: add a branch to `load_model`, and a folder of the old format to tests/data/."""

ABOUT, NETWORK, TENSORS = "model.json", "model.onnx", "classifier.safetensors"
FILES = (NETWORK, TENSORS)
MOST_JSON = 64 << 20
"""Bytes of ``model.json``: with 100,000 labels it has a few."""
PACKAGED = Path(__file__).parents[1] / "data" / "model"
"""The model in the package: apple, cherry or tomato. benchmarks/fruits.py makes it."""


def save_model(folder: Path, backbone_file: bytes, top: Head, about: dict[str, Any]) -> None:
    """Write the folder; ``about``: what ``model.json`` says beside what this function adds."""
    from safetensors.numpy import save as to_bytes

    folder.mkdir(parents=True, exist_ok=True)
    (folder / NETWORK).write_bytes(to_onnx(backbone_file, top))
    tensors = {
        "mean": top.mean,
        "linear": top.linear,
        "weight": top.classifier.weight,
        "bias": top.classifier.bias,
        **{f"{DETECTOR}{name}": value for name, value in top.detector.tensors.items()},
    }
    content = to_bytes({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    (folder / TENSORS).write_bytes(content)
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
    write_json(folder / ABOUT, {**about, "digest": _own_digest(about)})


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
    about
        ``model.json``.
    files
        The bytes of the folder's files by name, as they were checked.
    """

    folder: Path
    about: dict[str, Any]
    files: dict[str, bytes] = field(repr=False)

    @property
    def content(self) -> bytes:
        """The bytes of ``model.onnx``."""
        return self.files[NETWORK]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the probabilities."""
        return tuple(self.about["labels"])

    @property
    def version(self) -> str:
        """The first digits of the digest of ``model.onnx``."""
        return str(self.about["digests"][NETWORK])[:12]

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
            digest=self.about["digests"][NETWORK],
            image_size=int(self.about["preprocessing"]["image_size"]),
            device=device,
            batch_size=GPU_BATCH if device == "cuda" else CPU_BATCH,
            threads=threads,
            outputs=outputs,
            payload=self.content,
        )

    def head(self) -> Head:
        """Return what comes after the backbone, for NumPy."""
        tensors: dict[str, Any] = read_tensors(self.files[TENSORS], self.about, TENSORS)
        weight, bias = tensors.pop("weight"), tensors.pop("bias")
        mean, linear = tensors.pop("mean"), tensors.pop("linear")
        rest = {name.removeprefix(DETECTOR): value for name, value in tensors.items()}
        about = self.about["unknown"]
        detector = Detector(about["method"], rest, about["threshold"])
        classifier = Classifier(self.labels, weight, bias, self.about["temperature"])
        return Head(self.about["power"], mean, linear, classifier, detector)


def load_model(folder: str | Path, *, verify: str | None = None) -> Model:
    """Read a model's folder, check all of it, and try it. Runs no code from the files.

    Digests show that a file was damaged, not who made it. With ``verify``, a public key's file or
    ``IDENTITY@ISSUER``, the folder must hold a signature of that signer
    (`pomona.model.signature.verify`).

    Raises
    ------
    RequestError
        If there is none.
    MismatchError
        If a file is missing, was changed or doesn't fit the others, the format is newer, or the
        signature isn't there or isn't the signer's.
    WeightsError
        If ``model.onnx`` can't be used (`pomona.model.validation.check_network`).
    """
    folder = Path(folder).expanduser()
    content, about = _read_about(folder)
    files = {ABOUT: content}
    for name in FILES:
        files[name] = _read(folder / name, MOST_BYTES)
        if hashlib.sha256(files[name]).hexdigest() != about["digests"].get(name):
            raise MismatchError(
                f"{folder / name} was changed or damaged: its digest isn't the one in {ABOUT}; "
                "copy the folder again, or train again"
            )
    if verify is not None:  # before a parser reads what may be anybody's
        from pomona.model import signature

        signature.verify(files, folder / signature.NAME, verify)
    # The digest is over all of the folder. What comes in the package is trusted as its code is.
    if about["digest"] not in _checked and folder.resolve() != PACKAGED:
        check_about(about, str(folder / ABOUT))
        read_tensors(files[TENSORS], about, str(folder / TENSORS))
        check_network(files[NETWORK], about, str(folder / NETWORK))
        _checked.add(about["digest"])
    return Model(folder, about, files)


_checked: set[str] = set()
"""Digests of the models that this process has checked: a check takes half a second."""


def _read(file: Path, most: int) -> bytes:
    """Return a file's bytes; a MismatchError if it is missing or has more than ``most``."""
    if not file.is_file():
        raise MismatchError(f"{file} is missing: copy the whole folder, or train again")
    if file.stat().st_size > most:
        raise MismatchError(f"{file} has more than {most:,} bytes: it is no model of Pomona's")
    return file.read_bytes()


def _read_about(folder: Path) -> tuple[bytes, dict[str, Any]]:
    file = folder / ABOUT
    if not file.exists():
        raise RequestError(
            f"there is no model in {folder}: pomona train --out OUT makes one in OUT/model"
        )
    content = _read(file, MOST_JSON)
    try:
        about = dict(json.loads(content))
    except (ValueError, TypeError, RecursionError) as error:
        raise MismatchError(f"{file} is damaged: copy the folder again, or train again") from error
    number = about.get("format")
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= FORMAT:
        raise MismatchError(
            f"{file} has format {number}, and this Pomona reads up to {FORMAT}: update Pomona"
        )
    if about.get("digest") != _own_digest(about) or not isinstance(about.get("digests"), dict):
        raise MismatchError(
            f"{file} was changed: its digest doesn't fit; copy the folder again, or train again"
        )
    return content, about
