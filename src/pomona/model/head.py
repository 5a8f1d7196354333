"""What comes after the backbone: projection, classifier, detector; in NumPy and as ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pomona.backbone import mobilenet
from pomona.model.classifier import Classifier, softmax
from pomona.model.projection import Projection, raised
from pomona.model.sampling import Array, Rows
from pomona.model.unknown import Detector

OUTPUTS = ("probabilities", "score", "pca_features", "features")
ANSWER = ("probabilities", "score")
"""The outputs that an answer needs."""


@dataclass(frozen=True)
class Head:
    """What comes after the backbone: pca_features are linear · (features^power − mean)."""

    power: float
    mean: Array  # float64 [1280]
    linear: Array  # float64 [k, 1280]
    classifier: Classifier  # on pca_features, as the detector
    detector: Detector

    def apply(self, features: Rows) -> dict[str, Array]:
        """Return `OUTPUTS` for features [n, 1280], computed in float64."""
        z = (raised(features, self.power) - self.mean) @ self.linear.T
        logits = self.classifier.logits(z)
        score = self.detector.score(z, logits)
        values = (softmax(logits), score, z, features.astype(np.float64))
        return dict(zip(OUTPUTS, values, strict=True))


def make_head(projection: Projection, classifier: Classifier, detector: Detector) -> Head:
    """Put a head together."""
    return Head(projection.power, projection.mean, projection.linear(), classifier, detector)


class _Graph:
    """Nodes and constants to append to a backbone's graph."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, npt.NDArray[Any]] = {}

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        self.constants[name] = np.asarray(value, np.float32)
        return name


def to_onnx(backbone_file: bytes, top: Head, outputs: tuple[str, ...] = OUTPUTS) -> bytes:
    """Append a head to a backbone's ONNX file, which has the output ``features``.

    The new file gives some of `OUTPUTS`: a phone needs only `ANSWER`.
    """
    from onnx import TensorProto, checker, helper, load_from_string, numpy_helper

    graph = _Graph()
    z = _add_projection(graph, top)
    logits = _add_classifier(graph, z, top.classifier)
    _add_score(graph, z, logits, top.detector)
    proto = load_from_string(backbone_file)
    proto.graph.node.extend(graph.nodes)
    proto.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in graph.constants.items()
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


def _add_projection(graph: _Graph, top: Head) -> str:
    features = mobilenet.OUTPUT
    if top.power != 1:
        size = graph.node("Abs", [features], "head.size")
        grown = graph.node("Pow", [size, graph.constant("head.power", top.power)], "head.grown")
        sign = graph.node("Sign", [features], "head.sign")
        features = graph.node("Mul", [sign, grown], "head.raised")
    centred = graph.node("Sub", [features, graph.constant("head.mean", top.mean)], "head.centred")
    return graph.node(
        "MatMul", [centred, graph.constant("head.linear", top.linear.T)], "pca_features"
    )


def _add_classifier(graph: _Graph, z: str, classifier: Classifier) -> str:
    weight = graph.constant("head.weight", classifier.weight.T / classifier.temperature)
    bias = graph.constant("head.bias", classifier.bias / classifier.temperature)
    product = graph.node("MatMul", [z, weight], "head.product")
    logits = graph.node("Add", [product, bias], "head.logits")
    graph.node("Softmax", [logits], "probabilities", axis=1)
    return logits


def _add_score(graph: _Graph, z: str, logits: str, detector: Detector) -> None:
    if detector.method == "max_probability":
        graph.node("ReduceMax", ["probabilities"], "score", axes=[1], keepdims=0)
    elif detector.method == "energy":
        graph.node("ReduceLogSumExp", [logits], "score", axes=[1], keepdims=0)
    else:  # -min ‖z − c‖² = max (2 z·c − ‖c‖²) − ‖z‖²
        centres = detector.tensors["centres"]
        graph.constants = {"head.axis": np.array([1], np.int64), **graph.constants}
        whitening = graph.constant("head.whitening", detector.tensors["whitening"])
        white = graph.node("MatMul", [z, whitening], "head.white")
        doubled = graph.constant("head.centres", 2 * centres.T)
        cross = graph.node("MatMul", [white, doubled], "head.cross")
        squares = graph.constant("head.squares", (centres**2).sum(axis=1))
        near = graph.node("Sub", [cross, squares], "head.near")
        nearest = graph.node("ReduceMax", [near], "head.nearest", axes=[1])
        norm = graph.node("ReduceSumSquare", [white], "head.far", axes=[1])
        column = graph.node("Sub", [nearest, norm], "head.column")
        graph.node("Squeeze", [column, "head.axis"], "score")
