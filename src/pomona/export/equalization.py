"""Cross-layer equalization of MobileNetV2 before quantization (Nagel et al. 2019, section 4.1).

And what it and the quantization go by: statistics of activations on calibration photos.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pomona.backbone import mobilenet
from pomona.backbone.mobilenet import INPUT
from pomona.backbone.session import onnx_session
from pomona.photos.decoding import Pixels

BATCH = 8
"""Photos per call of a session."""
MARGIN = 1.1
"""How far above the largest value of calibration a channel may go before ReLU6 cuts it."""
MOST_SCALE = 64.0

Array = npt.NDArray[np.float64]


def equalize(proto: Any, pixels: Pixels) -> None:
    """Scale channels to similar ranges, in place, and divide the weights after them by the same.

    On the calibration photos this changes no feature: ReLU6 cuts nothing that it didn't cut
    before. A value more than `MARGIN` times the largest of calibration is cut, as it would be in
    integers without the scaling. ``proto`` is the phone's file with Pomona's own backbone
    (onnx.ModelProto).
    """
    highest = _highest(proto, pixels)
    weights = _Weights(proto)
    _equalize_within_blocks(weights, highest)
    _equalize_between_blocks(weights, highest)


def _equalize_within_blocks(weights: _Weights, highest: dict[str, Array]) -> None:
    for conv, after in itertools.pairwise(mobilenet.convs()):
        if conv.relu:
            most = np.maximum(highest[f"{conv.weight}.relu"], 1e-3)
            room = 6 / (MARGIN * most)
            # A depthwise convolution has one row of weights for each channel: scaling is free.
            wanted = room if after.groups > 1 else np.maximum(_share(weights, [after], most), 1)
            weights.scale([conv], [after], np.clip(np.minimum(room, wanted), 1, MOST_SCALE))


def _equalize_between_blocks(weights: _Weights, highest: dict[str, Array]) -> None:
    """Blocks whose outputs are added share one scale for each channel of the sum."""
    blocks = mobilenet.blocks()
    first = 1
    while first < len(blocks) - 1:
        last = first
        while blocks[last + 1].residual:
            last += 1
        before = [blocks[n].convs[-1] for n in range(first, last + 1)]
        after_all = [blocks[n].convs[0] for n in range(first + 1, last + 2)]
        names = [f"{conv.weight}.out" for conv in before]
        names += [f"{name}.sum" for name in names if f"{name}.sum" in highest]
        most = np.maximum(np.max([highest[name] for name in names], axis=0), 1e-3)
        weights.scale(before, after_all, _share(weights, after_all, most))
        first = last + 1


def _share(weights: _Weights, after: list[mobilenet.Conv], most: Array) -> Array:
    """Return scales that give each channel's activation and weights equal ranges."""
    own = np.max(
        [np.abs(weights[f"{conv.weight}.w"]).max(axis=(0, 2, 3)) for conv in after], axis=0
    )
    scale = np.sqrt(np.maximum(own, 1e-9) / most)
    return np.asarray(scale / np.exp(np.log(scale).mean()))


class _Weights:
    """The convolutions' weights and biases in a graph, read as float64 and changed in place."""

    def __init__(self, proto: Any) -> None:
        self._tensors = {tensor.name: tensor for tensor in proto.graph.initializer}

    def __getitem__(self, name: str) -> Array:
        from onnx import numpy_helper

        return np.asarray(numpy_helper.to_array(self._tensors[name]), np.float64)

    def _set(self, name: str, value: Array) -> None:
        from onnx import numpy_helper

        self._tensors[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))

    def scale(
        self, before: list[mobilenet.Conv], after: list[mobilenet.Conv], factor: Array
    ) -> None:
        """Multiply the channels between convolutions."""
        rows = factor[:, None, None, None]
        for conv in before:
            self._set(f"{conv.weight}.w", self[f"{conv.weight}.w"] * rows)
            self._set(f"{conv.weight}.b", self[f"{conv.weight}.b"] * factor)
        for conv in after:
            own = rows if conv.groups > 1 else factor[None, :, None, None]
            self._set(f"{conv.weight}.w", self[f"{conv.weight}.w"] / own)


def _highest(proto: Any, pixels: Pixels) -> dict[str, Array]:
    """Return the largest absolute value in each channel of every activation, by its name."""
    names = [
        node.output[0]
        for node in proto.graph.node
        if node.name.startswith("features.") and node.op_type in ("Conv", "Clip", "Add")
    ]
    most = measure(proto, names, pixels, "ReduceMax")
    least = measure(proto, names, pixels, "ReduceMin")
    return {name: np.maximum(most[name], -least[name]) for name in names}


def batches(pixels: Pixels) -> Iterator[dict[str, Pixels]]:
    """Yield photos, uint8 [n, h, w, 3], as a session takes them, `BATCH` at a time."""
    for start in range(0, len(pixels), BATCH):
        yield {INPUT: pixels[start : start + BATCH]}


def measure(proto: Any, names: list[str], pixels: Pixels, kind: str) -> dict[str, Array]:
    """Return a statistic of each channel of some activations, [n, channels, h, w], on photos.

    The graph names them; ``kind`` is ``ReduceMean``, ``ReduceMax`` or ``ReduceMin``, over photos
    and positions.
    """
    from onnx import TensorProto, helper

    cut = type(proto).FromString(proto.SerializeToString())
    last = max(n for n, node in enumerate(cut.graph.node) if node.output[0] in names)
    del cut.graph.node[last + 1 :]
    del cut.graph.output[:]
    for name in names:
        output = f"{name}.{kind}"
        cut.graph.node.append(helper.make_node(kind, [name], [output], axes=[0, 2, 3], keepdims=0))
        cut.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    session = onnx_session(cut.SerializeToString())
    parts = [session.run(None, batch) for batch in batches(pixels)]
    sizes = np.array([len(batch[INPUT]) for batch in batches(pixels)], np.float64)
    joined = (np.array(column, np.float64) for column in zip(*parts, strict=True))
    combine: dict[str, Callable[[Array], Array]] = {
        "ReduceMean": lambda rows: sizes @ rows / sizes.sum(),
        "ReduceMax": lambda rows: np.max(rows, axis=0),
        "ReduceMin": lambda rows: np.min(rows, axis=0),
    }
    return {name: combine[kind](rows) for name, rows in zip(names, joined, strict=True)}
