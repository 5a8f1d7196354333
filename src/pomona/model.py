"""The model: one folder, from a photo to an answer, the same file wherever it runs.

``model.onnx`` holds everything from pixels to probabilities; ``classifier.safetensors`` holds what
comes after the backbone once more, to be applied in NumPy; ``model.json`` says what they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pomona import backbone, manifest, mobilenet
from pomona.backbone import BackboneSpec
from pomona.classifier import Classifier, Rows, softmax
from pomona.errors import MismatchError, RequestError
from pomona.projection import Projection, raised
from pomona.unknown import Detector

FORMAT = 1
"""Of the folder. Raise it when a reader of the old one would be wrong, and keep reading the old
ones: add a branch to `load`, and a folder of the old format to tests/."""

FILES = ("model.onnx", "classifier.safetensors")
PACKAGED = Path(__file__).with_name("data") / "model"
"""The model in the package: apple, cherry or tomato. benchmarks/fruits.py makes it."""

OUTPUTS = ("probabilities", "score", "pca_features", "features")
ANSWER = ("probabilities", "score")
"""The outputs that an answer needs."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Head:
    """What comes after the backbone: projection, classifier, detector.

    Attributes
    ----------
    power, mean, linear
        pca_features are linear · (features^power − mean); float64 [1280] and [k, 1280].
    classifier, detector
        On pca_features.
    """

    power: float
    mean: Array
    linear: Array
    classifier: Classifier
    detector: Detector

    def apply(self, features: Rows) -> dict[str, Array]:
        """Return `OUTPUTS` for features [n, 1280], computed in float64."""
        z = (raised(features, self.power) - self.mean) @ self.linear.T
        logits = self.classifier.logits(z)
        score = self.detector.score(z, logits)
        found = (softmax(logits), score, z, features.astype(np.float64))
        return dict(zip(OUTPUTS, found, strict=True))


def head(projection: Projection, classifier: Classifier, detector: Detector) -> Head:
    """Put a head together."""
    return Head(projection.power, projection.mean, projection.linear(), classifier, detector)


# --- the graph ---------------------------------------------------------------------------------


def to_onnx(backbone_file: bytes, top: Head, outputs: tuple[str, ...] = OUTPUTS) -> bytes:
    """Set a head onto a backbone's ONNX file.

    Parameters
    ----------
    backbone_file
        With the output ``features``.
    outputs
        Which of `OUTPUTS` the file gives: a phone needs only `ANSWER`.
    """
    from onnx import TensorProto, checker, helper, numpy_helper
    from onnx import load_from_string as load_onnx

    proto = load_onnx(backbone_file)
    nodes: list[Any] = []
    constants: dict[str, npt.NDArray[Any]] = {}

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(name: str, value: npt.ArrayLike) -> str:
        constants[name] = np.asarray(value, np.float32)
        return name

    here = mobilenet.OUTPUT
    if top.power != 1:
        size = node("Abs", [here], "head.size")
        grown = node("Pow", [size, constant("head.power", top.power)], "head.grown")
        here = node("Mul", [node("Sign", [here], "head.sign"), grown], "head.raised")
    here = node("Sub", [here, constant("head.mean", top.mean)], "head.centred")
    z = node("MatMul", [here, constant("head.linear", top.linear.T)], "pca_features")
    t = top.classifier.temperature
    weight = constant("head.weight", top.classifier.weight.T / t)
    bias = constant("head.bias", top.classifier.bias / t)
    logits = node("Add", [node("MatMul", [z, weight], "head.product"), bias], "head.logits")
    node("Softmax", [logits], "probabilities", axis=1)
    if top.detector.method == "max_probability":
        node("ReduceMax", ["probabilities"], "score", axes=[1], keepdims=0)
    elif top.detector.method == "energy":
        node("ReduceLogSumExp", [logits], "score", axes=[1], keepdims=0)
    else:
        tensors = top.detector.tensors
        white = node("MatMul", [z, constant("head.whitening", tensors["whitening"])], "head.white")
        centres = tensors["centres"]
        cross = node("MatMul", [white, constant("head.centres", 2 * centres.T)], "head.cross")
        own = constant("head.squares", (centres**2).sum(axis=1))
        near = node("ReduceMax", [node("Sub", [cross, own], "head.near")], "head.nearest", axes=[1])
        far = node("ReduceSumSquare", [white], "head.far", axes=[1])
        column = node("Sub", [near, far], "head.column")
        proto.graph.initializer.append(
            numpy_helper.from_array(np.array([1], np.int64), "head.axis")
        )
        node("Squeeze", [column, "head.axis"], "score")
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in constants.items()
    )
    widths = {
        "probabilities": [len(top.classifier.labels)],
        "score": [],
        "pca_features": [len(top.linear)],
        "features": [len(top.mean)],
    }
    del proto.graph.output[:]
    proto.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *widths[name]])
        for name in outputs
    )
    checker.check_model(proto)
    return bytes(proto.SerializeToString())


# --- the folder --------------------------------------------------------------------------------


def save(folder: Path, backbone_file: bytes, top: Head, about: dict[str, Any]) -> None:
    """Write the folder.

    Parameters
    ----------
    about
        What ``model.json`` holds beside labels, threshold, digests and the format.
    """
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
    digests = {name: manifest.sha256(folder / name) for name in FILES}
    whole = {**about, "digests": digests}
    manifest.write_json(folder / "model.json", {**whole, "digest": _own_digest(whole)})


def _own_digest(about: dict[str, Any]) -> str:
    """Return the digest of ``model.json`` less the digest itself: a changed label shows too."""
    rest = {name: value for name, value in about.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Model:
    """A model that was read and checked.

    Attributes
    ----------
    folder
        Where it lies.
    about
        What ``model.json`` holds.
    content
        ``model.onnx``.
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
        """Return what `pomona.extract` needs to run the model. Crosses to workers.

        With ``elsewhere`` the GPUs are the workers'.
        """
        found = backbone.find_device("onnx", device, elsewhere=elsewhere)
        return BackboneSpec(
            weights=str(self.about["weights"]["name"]),
            digest=self.about["digests"]["model.onnx"],
            image_size=int(self.about["preprocessing"]["image_size"]),
            device=found,
            batch_size=backbone.GPU_BATCH if found == "cuda" else backbone.CPU_BATCH,
            threads=threads,
            outputs=outputs,
            payload=self.content,
        )

    def head(self) -> Head:
        """Return what comes after the backbone, for NumPy."""
        from safetensors.numpy import load_file

        tensors: dict[str, Any] = load_file(self.folder / "classifier.safetensors")
        parts = {
            name.removeprefix("detector."): value
            for name, value in tensors.items()
            if name.startswith("detector.")
        }
        about = self.about["unknown"]
        detector = Detector(about["method"], parts, about["threshold"])
        classifier = Classifier(
            self.labels, tensors["weight"], tensors["bias"], self.about["temperature"]
        )
        return Head(self.about["power"], tensors["mean"], tensors["linear"], classifier, detector)


def load(folder: str | Path) -> Model:
    """Read a model's folder and check it. Runs no code from the files.

    Raises
    ------
    RequestError
        If there is none.
    MismatchError
        If a file is missing or was changed, or the format is newer.
    """
    place = Path(folder).expanduser()
    about = _read_about(place)
    for name in FILES:
        file = place / name
        if not file.is_file():
            raise MismatchError(f"{file} is missing: copy the whole folder, or train again")
        if manifest.sha256(file) != about["digests"].get(name):
            raise MismatchError(
                f"{file} was changed or damaged: its digest isn't the one in model.json; copy the "
                "folder again, or train again"
            )
    return Model(place, about, (place / "model.onnx").read_bytes())


def _read_about(place: Path) -> dict[str, Any]:
    file = place / "model.json"
    try:
        about = dict(json.loads(file.read_bytes()))
    except FileNotFoundError:
        raise RequestError(
            f"there is no model in {place}: pomona train --out OUT makes one in OUT/model"
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


# --- answers -----------------------------------------------------------------------------------

ANSWERS = pa.schema(
    [
        ("label", pa.string()),  # null: unknown, or the photo can't be used
        ("probability", pa.float32()),  # of the most probable label, also of an unknown photo
        ("unknown", pa.bool_()),  # null where the photo can't be used
        ("reason", pa.string()),  # why it is unknown, else null
        ("score", pa.float32()),  # below the model's threshold: unknown
        ("nearest", pa.list_(pa.string())),  # the most probable labels, best first
        ("probabilities", pa.list_(pa.float32())),  # theirs
        ("error", pa.string()),  # one of pomona.schema.ERRORS, or null
    ]
)
"""What `predict` adds to each photo."""


@dataclass(frozen=True)
class Recogniser:
    """A model as it crosses to workers: what to run and how to read the outcome."""

    spec: BackboneSpec
    labels: tuple[str, ...]
    threshold: float
    method: str
    top: int = 3


def recogniser(model: Model, top: int = 3, **options: Any) -> Recogniser:
    """Make a recogniser; ``options`` are those of `Model.spec`."""
    if top < 1:
        raise RequestError(f"--top is at least 1, not {top}")
    about = model.about["unknown"]
    threshold, method = float(about["threshold"]), str(about["method"])
    top = min(top, len(model.labels))
    return Recogniser(model.spec(**options), model.labels, threshold, method, top)


def with_threads(found: Recogniser, threads: int) -> Recogniser:
    """Return the recogniser with another number of CPU threads."""
    return replace(found, spec=replace(found.spec, threads=threads))


def predict(batches: Iterator[pa.RecordBatch], found: Recogniser) -> Iterator[pa.RecordBatch]:
    """Answer for photos; calls `pomona.extract`. Runs on workers.

    Parameters
    ----------
    batches
        As `pomona.extract` takes them: with a column ``content``.

    Yields
    ------
    pa.RecordBatch
        One for each that came in: its columns less ``content``, then `ANSWERS`.
    """
    for batch in backbone.extract(batches, found.spec):
        yield _answers(batch, found)


def _answers(batch: pa.RecordBatch, found: Recogniser) -> pa.RecordBatch:
    kept = batch.drop_columns(["width", "height", *ANSWER, "error"])
    rows = answers(batch, found)
    columns = [pa.array([row[f.name] for row in rows], f.type) for f in ANSWERS]
    return pa.RecordBatch.from_arrays(
        [*kept.columns, *columns], schema=pa.schema([*kept.schema, *ANSWERS])
    )


def answers(batch: pa.RecordBatch, found: Recogniser) -> list[dict[str, Any]]:
    """Return the answers, as `ANSWERS`, for a batch that `pomona.extract` gave with `ANSWER`."""
    scores, errors = batch["score"].to_pylist(), batch["error"].to_pylist()
    rows = [
        answer(p, s, found) for p, s in zip(_vectors(batch["probabilities"]), scores, strict=True)
    ]
    for row, error in zip(rows, errors, strict=True):
        row["error"] = error
    return rows


def _vectors(column: pa.Array) -> Iterator[npt.NDArray[np.float32] | None]:
    for item in column:
        yield item.values.to_numpy() if item.is_valid else None


def answer(
    probabilities: npt.NDArray[np.float32] | None, score: float | None, found: Recogniser
) -> dict[str, Any]:
    """Return one photo's answer, as `ANSWERS`; all null for a photo that can't be used."""
    if probabilities is None or score is None:
        return dict.fromkeys(ANSWERS.names)
    order = np.argsort(-probabilities, kind="stable")[: found.top]
    nearest = [found.labels[n] for n in order]
    unknown = score < found.threshold
    return {
        "label": None if unknown else nearest[0],
        "probability": float(probabilities[order[0]]),
        "unknown": unknown,
        "reason": why(found.method) if unknown else None,
        "score": score,
        "nearest": nearest,
        "probabilities": [float(probabilities[n]) for n in order],
        "error": None,
    }


def why(method: str) -> str:
    """Return the reason for "unknown" that goes with a detector's method."""
    return {
        "max_probability": "no label is probable enough",
        "energy": "no label gets enough evidence",
        "distance": "too far from every kind of photo that the model was trained on",
        "neighbours": "too far from the nearest photo that the model was trained on",
    }[method]
