"""What comes after the backbone: projection, classifier, detector; in NumPy and as ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pomona.backbone import mobilenet
from pomona.model.classifier import Classifier, Rows, softmax
from pomona.model.projection import Projection, raised
from pomona.model.unknown import Detector

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


def make_head(projection: Projection, classifier: Classifier, detector: Detector) -> Head:
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
