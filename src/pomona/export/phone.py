"""The model's file for phones and browsers, float32 or half precision, and the page around it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pomona.backbone.mobilenet import INPUT
from pomona.backbone.session import onnx_session
from pomona.model.artifact import Model
from pomona.model.head import ANSWER
from pomona.model.recogniser import why
from pomona.web import page

SMALL = 1024
"""Tensors of fewer numbers stay float32: biases and constants, which take hardly any space."""


def phone_file(content: bytes) -> bytes:
    """Return a model's file with only the outputs of an answer (`ANSWER`) and all nodes named."""
    from onnx import checker, load_from_string

    proto = load_from_string(content)
    kept = {output.name: output for output in proto.graph.output if output.name in ANSWER}
    del proto.graph.output[:]
    proto.graph.output.extend(kept[name] for name in ANSWER)
    for node in proto.graph.node:
        node.name = node.name or node.output[0]
    checker.check_model(proto)
    return bytes(proto.SerializeToString())


def half_precision(content: bytes, *, head: bool = True) -> bytes:
    """Return the file with float16 weights, each cast to float32 before its use.

    Every execution provider runs that, and ONNX Runtime does the casts once, when it loads the
    file. With ``head=False`` what comes after the backbone stays float32.
    """
    from onnx import TensorProto, checker, helper, load_from_string, numpy_helper

    proto = load_from_string(content)
    casts = []
    for tensor in proto.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        if tensor.name.startswith("head.") and not head:
            continue
        value = numpy_helper.to_array(tensor)
        if value.size < SMALL or np.abs(value).max() > np.finfo(np.float16).max:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float16), f"{name}.half"))
        casts.append(
            helper.make_node("Cast", [f"{name}.half"], [name], f"{name}.cast", to=TensorProto.FLOAT)
        )
    put_first(proto, casts)
    checker.check_model(proto)
    return bytes(proto.SerializeToString())


def put_first(proto: Any, nodes: list[Any]) -> None:
    """Insert nodes before all others of a graph."""
    rest = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *rest])


def page_files(
    model: Model, content: bytes | None = None, *, service: bool, needs_key: bool = False
) -> page.Site:
    """Return the files of the page that recognises fruit with a model: `pomona.web.page.site`.

    ``content`` is the model's file for the device, as `phone_file` returns it, or a smaller one;
    by default it is made here.
    """
    content = phone_file(model.content) if content is None else content
    size = int(model.about["preprocessing"]["image_size"])
    unknown = model.about["unknown"]
    record = {
        "version": model.version,
        "labels": list(model.labels),
        "threshold": float(unknown["threshold"]),
        "reason": why(unknown["method"]),
        "size": size,
        "probe": _probe(content, size),
    }
    return page.site(content, record, service=service, needs_key=needs_key)


def _probe(content: bytes, size: int) -> dict[str, Any]:
    """Return the file's answer for `_pattern`: the page compares its own runtime's with it."""
    outputs = onnx_session(content).run(list(ANSWER), {INPUT: _pattern(size)[None]})
    probabilities, score = (np.asarray(output)[0] for output in outputs)
    return {"probabilities": [float(p) for p in probabilities], "score": float(score)}


def _pattern(size: int) -> npt.NDArray[np.uint8]:
    """Return a picture [size, size, 3] that the page makes by the same formula (``worker.js``)."""
    y, x, c = np.ogrid[:size, :size, :3]
    picture: npt.NDArray[np.uint8] = ((3 * x + 5 * y + 80 * c) % 256).astype(np.uint8)
    return picture
