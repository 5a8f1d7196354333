"""Statistics of a graph's activations on the calibration photos."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pomona.backbone.mobilenet import INPUT
from pomona.backbone.session import onnx_session

BATCH = 8

Array = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]


def batches(pixels: Pixels) -> Iterator[dict[str, Pixels]]:
    """Yield photos, uint8 [n, h, w, 3], as a session takes them, `BATCH` at a time."""
    for start in range(0, len(pixels), BATCH):
        yield {INPUT: pixels[start : start + BATCH]}


def measure(proto: Any, names: list[str], pixels: Pixels, kind: str) -> dict[str, Array]:
    """Run photos through a graph and return a statistic of each channel of some activations.

    Parameters
    ----------
    names
        The activations, as the graph names them; each is [n, channels, h, w].
    pixels
        uint8 [n, h, w, 3].
    kind
        ``ReduceMean``, ``ReduceMax`` or ``ReduceMin``, over photos and positions.
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
