"""8-bit integers: static quantization of the backbone (Jacob et al. 2018).

The result has pairs of QuantizeLinear and DequantizeLinear. The head stays float32: it raises
features to a power, which makes small errors large. MobileNetV2 loses much of its accuracy to the
plain recipe (docs/log.md), therefore

- channels are scaled to similar ranges first (`pomona.export.equalization`);
- the first three blocks, `FLOAT_BLOCKS`, stay float32: they hold 1 % of the weights and cause the
  largest errors;
- in `STORED_BLOCKS` only the weights are integers, and the arithmetic is float32: single values of
  their residual sums reach 30 times the standard deviation of the rest;
- each convolution's bias is corrected, from the first to the last, by the mean difference from
  float32 that remains on the calibration photos (Nagel et al. 2019, section 4.2).

Activations are uint8 and weights int8. AVX2, and AVX-512 without VNNI, add two products in 16 bits,
which may overflow silently: the weights' scales (`SAFE`) rule that out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pomona.backbone import mobilenet
from pomona.core.errors import RequestError
from pomona.export.equalization import Array, batches, equalize, measure
from pomona.export.phone import put_first
from pomona.photos.decoding import Pixels

FLOAT_BLOCKS = (0, 1, 2)
STORED_BLOCKS = (14, 15, 16, 17)

DEEP = 20_000
"""Tensors of `STORED_BLOCKS` with fewer numbers stay float32: the depthwise convolutions, which
take 100 kB together."""

SAFE = 127
"""Neighbouring weights of one sign add up to at most this. With activations of 255 the sum of two
products, which some CPUs keep in 16 bits, is then below 2^15, also after rounding."""


def steps() -> int:
    """Return how often `int8` calls ``step``."""
    return len(mobilenet.convs()) + 1


def int8(content: bytes, pixels: Pixels, *, per_channel: bool, step: Callable[[], None]) -> bytes:
    """Return a file of `pomona.export.phone.phone_file` with its backbone in 8-bit integers.

    Parameters
    ----------
    pixels
        Photos to calibrate on, uint8 [n, h, w, 3].
    per_channel
        Whether each output channel of a convolution has its own scale, or all share one.
    step
        Called `steps` times, for a progress bar.

    Raises
    ------
    RequestError
        If the backbone isn't Pomona's own graph.
    """
    from onnx import checker, load_from_string

    float32 = load_from_string(content)
    _refuse_foreign(float32)
    equalize(float32, pixels)
    proto = _with_pairs(float32, pixels, per_channel)
    _store(proto, per_channel)
    step()
    _correct(proto, float32, pixels, step)
    checker.check_model(proto)
    return bytes(proto.SerializeToString())


def _refuse_foreign(proto: Any) -> None:
    names = {node.name for node in proto.graph.node if node.op_type == "Conv"}
    if names != {f"{conv.weight}.out" for conv in mobilenet.convs()}:
        raise RequestError(
            "int8 knows Pomona's own MobileNetV2 only, and these weights came as an ONNX file: "
            "export without it, or extract and train again with the weights as safetensors"
        )


def _convs_of(numbers: tuple[int, ...]) -> set[str]:
    """Return the names of the convolutions' nodes in some of the blocks."""
    blocks = mobilenet.blocks()
    return {f"{conv.weight}.out" for number in numbers for conv in blocks[number].convs}


# --- putting integers in -----------------------------------------------------------------------


def _with_pairs(float32: Any, pixels: Pixels, per_channel: bool) -> Any:
    """Let onnxruntime measure ranges and insert the pairs around the nodes that become integer."""
    from onnx import helper, load
    from onnxruntime import quantization as ort

    class Photos(ort.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = batches(pixels)

        def get_next(self) -> dict[str, Pixels] | None:
            return next(self.batches, None)

    proto = type(float32).FromString(float32.SerializeToString())
    props = {entry.key: entry.value for entry in proto.metadata_props}
    # Batch norms are folded in already: this keeps onnxruntime from asking for pre-processing.
    helper.set_model_props(proto, {**props, "onnx.quant.pre_process": "onnxruntime.quant"})
    chosen = _integer_nodes(proto)
    with tempfile.TemporaryDirectory(prefix="pomona-") as folder:
        file = Path(folder, "int8.onnx")
        ort.quantize_static(
            proto,
            file,
            Photos(),
            quant_format=ort.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Clip", "Add"],
            nodes_to_quantize=chosen,
            per_channel=per_channel,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            extra_options={"TensorQuantOverrides": _scales(proto, chosen, per_channel)},
        )
        quantized = load(file)
    del quantized.metadata_props[:]
    helper.set_model_props(quantized, props)
    return quantized


def _integer_nodes(proto: Any) -> list[str]:
    """Return the names of the nodes outside `FLOAT_BLOCKS` and `STORED_BLOCKS`."""
    apart = tuple(
        name.removesuffix("out") for name in _convs_of(FLOAT_BLOCKS) | _convs_of(STORED_BLOCKS)
    )
    return [
        node.name
        for node in proto.graph.node
        if node.name.startswith("features.")
        and not node.name.startswith(apart)
        and node.op_type in ("Conv", "Clip", "Add")
    ]


def _scales(proto: Any, chosen: list[str], per_channel: bool) -> dict[str, list[dict[str, Any]]]:
    """Return the weights' scales as onnxruntime takes them: 8 bits, or fewer as `SAFE` demands."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    overrides = {}
    for conv in mobilenet.convs():
        if f"{conv.weight}.out" not in chosen:
            continue
        weight = numpy_helper.to_array(tensors[f"{conv.weight}.w"]).astype(np.float64)
        rows = weight.reshape(len(weight), -1)
        scale = np.abs(rows).max(axis=1) / 127
        if conv.groups == 1:
            scale = np.maximum(scale, _highest_pair(rows) / SAFE)
        scale = np.maximum(scale, np.finfo(np.float32).tiny)
        scales = scale if per_channel else scale.max(keepdims=True)
        overrides[f"{conv.weight}.w"] = [
            {"scale": np.array(value, np.float32), "zero_point": np.array(0, np.int8)}
            for value in scales
        ]
        if per_channel:
            overrides[f"{conv.weight}.w"][0]["axis"] = 0
    return overrides


def _highest_pair(rows: Array) -> Array:
    """Return the largest absolute sum of two neighbours of the same sign in each row."""
    sums = [
        (part[:, 1:] + part[:, :-1]).max(axis=1)
        for part in (np.maximum(rows, 0), np.maximum(-rows, 0))
    ]
    return np.asarray(np.maximum(*sums))


def _store(proto: Any, per_channel: bool) -> None:
    """Store the weights of `STORED_BLOCKS` as int8; they become float32 when the file is loaded."""
    from onnx import helper, numpy_helper

    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes = []
    for name in sorted(_convs_of(STORED_BLOCKS)):
        key = f"{name.removesuffix('.out')}.w"
        weight = numpy_helper.to_array(tensors[key]).astype(np.float64)
        if weight.size < DEEP:
            continue
        highest = np.abs(weight).max(axis=(1, 2, 3) if per_channel else None)
        scale = np.maximum(highest, np.finfo(np.float32).tiny) / 127
        wide = scale.reshape(-1, 1, 1, 1) if per_channel else scale
        stored, scales = f"{key}.int8", f"{key}.scale"
        integers = np.round(weight / wide).astype(np.int8)
        tensors[key].CopyFrom(numpy_helper.from_array(integers, stored))
        proto.graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), scales))
        nodes.append(
            helper.make_node("DequantizeLinear", [stored, scales], [key], f"{key}.stored", axis=0)
        )
    put_first(proto, nodes)


# --- bias correction ---------------------------------------------------------------------------


def _correct(proto: Any, float32: Any, pixels: Pixels, step: Callable[[], None]) -> None:
    """Correct biases so that each channel's mean is that of float32 (bias correction).

    One convolution after the other, because a correction changes the inputs of the next.
    """
    wanted = _means(float32, [n for n in float32.graph.node if n.op_type == "Conv"], pixels)
    for node in [node for node in proto.graph.node if node.op_type == "Conv"]:
        if node.name not in _convs_of(FLOAT_BLOCKS):
            means = _means(proto, [node], pixels)
            _add_to_bias(proto, node, wanted[node.name] - means[node.name])
        step()


def _means(proto: Any, nodes: list[Any], pixels: Pixels) -> dict[str, Array]:
    """Return the mean of each channel of convolutions' outputs, by the node's name."""
    means = measure(proto, [node.output[0] for node in nodes], pixels, "ReduceMean")
    return {node.name: means[node.output[0]] for node in nodes}


def _add_to_bias(proto: Any, node: Any, difference: Array) -> None:
    """Add to a convolution's bias, which is float32, or int32 before a DequantizeLinear."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    name = node.input[2]
    if name in tensors:
        bias = numpy_helper.to_array(tensors[name]) + difference
        tensors[name].CopyFrom(numpy_helper.from_array(bias.astype(np.float32), name))
        return
    pair = next(other for other in proto.graph.node if name in other.output)
    stored, scale = (numpy_helper.to_array(tensors[key]) for key in pair.input[:2])
    limits = np.iinfo(np.int32)
    bias = np.clip(np.round(stored + difference / scale), limits.min, limits.max)
    tensors[pair.input[0]].CopyFrom(numpy_helper.from_array(bias.astype(np.int32), pair.input[0]))
