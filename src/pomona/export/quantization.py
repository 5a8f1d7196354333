"""Smaller files of a model: half-precision weights, and 8-bit integers. Graph in, graph out.

``half`` stores weights as float16 and casts them back where they are used: every provider runs
that, and ONNX Runtime does the casts once, when it loads the file.

``int8`` is static quantisation of the backbone (Jacob et al. 2018) as pairs of QuantizeLinear and
DequantizeLinear; the head stays float32, for it raises features to a power, which makes small
errors large. MobileNetV2 loses much of its accuracy to the plain recipe (docs/log.md), so

- channels are scaled to alike ranges first (Nagel et al. 2019, section 4.1; `_equalise`);
- `FLOAT_BLOCKS`, the first three, stay float32: they hold 1 % of the weights, and err most;
- of `STORED_BLOCKS` only the weights are integers and the arithmetic is float32: single numbers of
  their residual sums reach 30 times the standard deviation of the rest;
- each convolution's bias is corrected, in the order of the data, by the mean difference to float32
  that is left on the calibration photos (Nagel et al. 2019, section 4.2).

Activations are uint8 and weights int8. AVX2, and AVX-512 without VNNI, add two products in 16 bits,
which may overflow without a word: the weights' scales are such that it can't happen (`SAFE`).
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pomona.backbone import mobilenet
from pomona.backbone.session import onnx_session
from pomona.core.errors import RequestError
from pomona.model.head import ANSWER

FLOAT_BLOCKS = (0, 1, 2)
STORED_BLOCKS = (14, 15, 16, 17)

MOST_DROP = 0.5
"""A variant is kept if its accuracy drops by less, in percentage points …"""
LEAST_AGREEMENT = 0.99
"""… and if at least this share of its labels are those of float32."""

SMALL = 1024
"""Tensors of fewer numbers stay float32: they are biases and constants, and weigh nothing."""
DEEP = 20_000
"""As `SMALL` for `STORED_BLOCKS`: their depthwise convolutions are 100 kB, and stay float32 too."""

SAFE = 127
"""Neighbouring weights of one sign add up to no more than this: with activations of 255 the sum of
two products, which some CPUs keep in 16 bits, is then below 2^15, also after rounding."""

BATCH = 8

MARGIN = 1.1
"""How far beyond the largest value of calibration a channel may go before ReLU6 cuts it."""
MOST_SCALE = 64.0

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
Steps = Callable[[], None]


def _batches(pixels: Pixels) -> Iterator[dict[str, Pixels]]:
    for start in range(0, len(pixels), BATCH):
        yield {mobilenet.INPUT: pixels[start : start + BATCH]}


# --- float32 and half --------------------------------------------------------------------------


def phone(content: bytes) -> bytes:
    """Return a model's file with the outputs of an answer only, and its nodes named."""
    from onnx import checker, load_from_string

    proto = load_from_string(content)
    kept = {output.name: output for output in proto.graph.output if output.name in ANSWER}
    del proto.graph.output[:]
    proto.graph.output.extend(kept[name] for name in ANSWER)
    for node in proto.graph.node:
        node.name = node.name or node.output[0]
    checker.check_model(proto)
    return bytes(proto.SerializeToString())


def half(content: bytes, *, head: bool = True) -> bytes:
    """Return the file with float16 weights, each cast to float32 before its use.

    Without ``head`` what comes after the backbone stays as it is.
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
    _put_first(proto, casts)
    checker.check_model(proto)
    return bytes(proto.SerializeToString())


def _put_first(proto: Any, nodes: list[Any]) -> None:
    rest = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *rest])


# --- int8 --------------------------------------------------------------------------------------


def steps() -> int:
    """Return how often `int8` tells that it has gone on."""
    return len(list(mobilenet.convs())) + 1


def int8(content: bytes, pixels: Pixels, *, per_channel: bool, step: Steps) -> bytes:
    """Quantise the backbone of a model's file.

    Parameters
    ----------
    content
        As `phone` returns it.
    pixels
        Photos to calibrate on, uint8 [n, h, w, 3].
    per_channel
        Whether each output channel of a convolution has its own scale, or all have one.

    Raises
    ------
    RequestError
        If the backbone isn't Pomona's own graph.
    """
    from onnx import checker, load_from_string

    float32 = load_from_string(content)
    _refuse_foreign(float32)
    _equalise(float32, pixels)
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
    found = mobilenet.blocks()
    return {f"{conv.weight}.out" for number in numbers for conv in found[number].convs}


# --- equalising channels -----------------------------------------------------------------------


def _equalise(proto: Any, pixels: Pixels) -> None:
    """Scale channels to alike ranges, and the weights that take them by the inverse.

    On the photos of calibration this changes no feature: ReLU6 doesn't cut what it didn't cut
    before. A value `MARGIN` times as large as any there is cut; without it, its integer would be.
    """
    found = mobilenet.blocks()
    highest = _highest(proto, pixels)
    weights = _Weights(proto)
    flat = list(mobilenet.convs())
    for conv, after in itertools.pairwise(flat):
        if conv.relu:
            most = np.maximum(highest[f"{conv.weight}.relu"], 1e-3)
            room = 6 / (MARGIN * most)
            # A depthwise convolution has one weight row for each channel: scales cost it nothing.
            wanted = room if after.groups > 1 else np.maximum(_share(weights, [after], most), 1)
            weights.scale([conv], [after], np.clip(np.minimum(room, wanted), 1, MOST_SCALE))
    first = 1
    while first < len(found) - 1:
        last = first
        while found[last + 1].residual:
            last += 1
        before = [found[n].convs[-1] for n in range(first, last + 1)]
        after_all = [found[n].convs[0] for n in range(first + 1, last + 2)]
        names = [f"{conv.weight}.out" for conv in before]
        names += [f"{name}.sum" for name in names if f"{name}.sum" in highest]
        most = np.maximum(np.max([highest[name] for name in names], axis=0), 1e-3)
        weights.scale(before, after_all, _share(weights, after_all, most))
        first = last + 1


def _share(weights: _Weights, after: list[mobilenet.Conv], most: Array) -> Array:
    """Return scales that share each channel's range out evenly between activation and weights."""
    own = np.max(
        [np.abs(weights[f"{conv.weight}.w"]).max(axis=(0, 2, 3)) for conv in after], axis=0
    )
    scale = np.sqrt(np.maximum(own, 1e-9) / most)
    return np.asarray(scale / np.exp(np.log(scale).mean()))


class _Weights:
    """The convolutions' weights in a graph."""

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
    """Return the largest size in each channel of every activation, by its name."""
    names = [
        node.output[0]
        for node in proto.graph.node
        if node.name.startswith("features.") and node.op_type in ("Conv", "Clip", "Add")
    ]
    most = _measure(proto, names, pixels, "ReduceMax")
    least = _measure(proto, names, pixels, "ReduceMin")
    return {name: np.maximum(most[name], -least[name]) for name in names}


# --- putting integers in -----------------------------------------------------------------------


def _with_pairs(float32: Any, pixels: Pixels, per_channel: bool) -> Any:
    """Let onnxruntime measure ranges and put pairs around what is to be integer."""
    from onnx import helper, load
    from onnxruntime import quantization as ort

    class Photos(ort.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = _batches(pixels)

        def get_next(self) -> dict[str, Pixels] | None:
            return next(self.batches, None)

    proto = type(float32).FromString(float32.SerializeToString())
    props = {entry.key: entry.value for entry in proto.metadata_props}
    # Norms are folded in: there is nothing to pre-process, and so onnxruntime doesn't ask for it.
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
        made = load(file)
    del made.metadata_props[:]
    helper.set_model_props(made, props)
    return made


def _integer_nodes(proto: Any) -> list[str]:
    """Return the nodes of all blocks but `FLOAT_BLOCKS` and `STORED_BLOCKS`."""
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
    """Return the scales of weights, in onnxruntime's words: 8 bits, or so much less as is safe."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    found = {}
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
        found[f"{conv.weight}.w"] = [
            {"scale": np.array(value, np.float32), "zero_point": np.array(0, np.int8)}
            for value in scales
        ]
        if per_channel:
            found[f"{conv.weight}.w"][0]["axis"] = 0
    return found


def _highest_pair(rows: Array) -> Array:
    """Return the largest sum of two neighbours of one sign, without it, in each row."""
    sums = [
        (part[:, 1:] + part[:, :-1]).max(axis=1)
        for part in (np.maximum(rows, 0), np.maximum(-rows, 0))
    ]
    return np.asarray(np.maximum(*sums))


def _store(proto: Any, per_channel: bool) -> None:
    """Store the weights of `STORED_BLOCKS` as int8 of 8 bits; float32 when the file is loaded."""
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
        tensors[key].CopyFrom(
            numpy_helper.from_array(np.round(weight / wide).astype(np.int8), f"{key}.int8")
        )
        proto.graph.initializer.append(
            numpy_helper.from_array(scale.astype(np.float32), f"{key}.scale")
        )
        nodes.append(
            helper.make_node(
                "DequantizeLinear", [f"{key}.int8", f"{key}.scale"], [key], f"{key}.stored", axis=0
            )
        )
    _put_first(proto, nodes)


# --- bias correction ---------------------------------------------------------------------------


def _correct(proto: Any, float32: Any, pixels: Pixels, step: Steps) -> None:
    """Give each convolution's output the mean that it has in float32, channel by channel.

    One after the other: a correction changes what comes after it.
    """
    wanted = _means(float32, [n for n in float32.graph.node if n.op_type == "Conv"], pixels)
    for node in [node for node in proto.graph.node if node.op_type == "Conv"]:
        if node.name not in _convs_of(FLOAT_BLOCKS):
            found = _means(proto, [node], pixels)
            _add_to_bias(proto, node, wanted[node.name] - found[node.name])
        step()


def _means(proto: Any, nodes: list[Any], pixels: Pixels) -> dict[str, Array]:
    """Return the mean of each channel of convolutions' outputs, by the node's name."""
    found = _measure(proto, [node.output[0] for node in nodes], pixels, "ReduceMean")
    return {node.name: found[node.output[0]] for node in nodes}


def _measure(proto: Any, names: list[str], pixels: Pixels, kind: str) -> dict[str, Array]:
    """Return the mean, the highest or the lowest value of each channel of activations."""
    from onnx import TensorProto, helper

    cut = type(proto).FromString(proto.SerializeToString())
    last = max(n for n, node in enumerate(cut.graph.node) if node.output[0] in names)
    del cut.graph.node[last + 1 :]
    del cut.graph.output[:]
    for name in names:
        outcome = f"{name}.{kind}"
        cut.graph.node.append(helper.make_node(kind, [name], [outcome], axes=[0, 2, 3], keepdims=0))
        cut.graph.output.append(helper.make_tensor_value_info(outcome, TensorProto.FLOAT, None))
    loaded = onnx_session(cut.SerializeToString())
    parts = [loaded.run(None, batch) for batch in _batches(pixels)]
    sizes = np.array([len(batch[mobilenet.INPUT]) for batch in _batches(pixels)], np.float64)
    joined = (np.array(column, np.float64) for column in zip(*parts, strict=True))
    ways: dict[str, Callable[[Array], Array]] = {
        "ReduceMean": lambda rows: sizes @ rows / sizes.sum(),
        "ReduceMax": lambda rows: np.max(rows, axis=0),
        "ReduceMin": lambda rows: np.min(rows, axis=0),
    }
    return {name: ways[kind](rows) for name, rows in zip(names, joined, strict=True)}


def _add_to_bias(proto: Any, node: Any, difference: Array) -> None:
    """Add to a bias, float32 or, behind its DequantizeLinear, int32."""
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


# --- the gate ----------------------------------------------------------------------------------


def judge(reference: Codes, guess: Codes, y: Codes) -> dict[str, Any]:
    """Compare a variant's labels with those of float32 and with the true ones, codes [n], n > 0.

    Returns
    -------
    dict
        ``accuracy_float32``, ``accuracy``, ``drop_points``, ``agreement``, and ``passed``: the
        drop is below `MOST_DROP` and the agreement at least `LEAST_AGREEMENT`.
    """
    before, after = float((reference == y).mean()), float((guess == y).mean())
    drop = 100 * (before - after)
    agreement = float((reference == guess).mean())
    return {
        "accuracy_float32": before,
        "accuracy": after,
        "drop_points": drop,
        "agreement": agreement,
        "passed": drop < MOST_DROP and agreement >= LEAST_AGREEMENT,
    }
