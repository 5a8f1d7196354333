"""MobileNetV2 1.0 (Sandler et al. 2018) as a table of layers, and as an ONNX graph.

Everything about the network is derived from `blocks`: the keys and shapes that a file of weights
must have, a random start, the ONNX graph here and the PyTorch module in
`pomona.backbone.mobilenet_torch`. Keys and padding (symmetric) are torchvision's.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pomona.core.errors import WeightsError

State = Mapping[str, npt.NDArray[np.generic]]

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of ImageNet's training photos, RGB in 0…1 (torchvision, ImageClassification preset)."""

BN_EPSILON = 1e-5

BLOCKS = (  # expansion t, channels c, repeats n, first stride s: the paper's table 2
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

NORM = ("weight", "bias", "running_mean", "running_var")
"""A batch norm's tensors."""

OPSET = 17
INPUT, OUTPUT = "image", "features"


class Conv(NamedTuple):
    """A convolution without bias, its batch norm, and whether a ReLU6 follows."""

    weight: str  # key of the convolution, without ".weight"
    norm: str  # key of the batch norm
    inputs: int
    outputs: int
    kernel: int
    stride: int
    groups: int
    relu: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Return the weight's shape: [outputs, inputs per group, kernel, kernel]."""
        return (self.outputs, self.inputs // self.groups, self.kernel, self.kernel)


class Block(NamedTuple):
    """Consecutive convolutions; with ``residual`` the block's input is added to its output."""

    convs: tuple[Conv, ...]
    residual: bool


@functools.cache
def blocks() -> tuple[Block, ...]:
    """Return the network from the first convolution to the last, 19 blocks."""
    network = [Block((Conv("features.0.0", "features.0.1", 3, 32, 3, 2, 1, True),), False)]
    channels = 32
    for expansion, outputs, repeats, first_stride in BLOCKS:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            key = f"features.{len(network)}.conv"
            network.append(_inverted_residual(key, channels, outputs, expansion, stride))
            channels = outputs
    key = f"features.{len(network)}"
    last = Conv(f"{key}.0", f"{key}.1", channels, 1280, 1, 1, 1, True)
    return (*network, Block((last,), False))


def _inverted_residual(key: str, inputs: int, outputs: int, expansion: int, stride: int) -> Block:
    hidden = inputs * expansion
    wide = []
    if expansion != 1:
        wide.append(Conv(f"{key}.0.0", f"{key}.0.1", inputs, hidden, 1, 1, 1, True))
    n = len(wide)
    wide.append(Conv(f"{key}.{n}.0", f"{key}.{n}.1", hidden, hidden, 3, stride, hidden, True))
    narrow = Conv(f"{key}.{n + 1}", f"{key}.{n + 2}", hidden, outputs, 1, 1, 1, False)
    return Block((*wide, narrow), stride == 1 and inputs == outputs)


def convs() -> list[Conv]:
    """Return every convolution, from the input to the output."""
    return [conv for block in blocks() for conv in block.convs]


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes that weights must have, from the input to the output."""
    shape_of: dict[str, tuple[int, ...]] = {}
    for conv in convs():
        shape_of[f"{conv.weight}.weight"] = conv.shape
        for part in NORM:
            shape_of[f"{conv.norm}.{part}"] = (conv.outputs,)
    return shape_of


def check(state: State, where: str) -> dict[str, npt.NDArray[np.float32]]:
    """Return the backbone's tensors as float32, in the order of `shapes`.

    Raises
    ------
    WeightsError
        Naming the first key that is missing, has another shape, or holds NaN or infinity.
    """
    checked: dict[str, npt.NDArray[np.float32]] = {}
    for key, shape in shapes().items():
        if key not in state:
            raise WeightsError(f"{where} is not MobileNetV2 as torchvision names it: no key {key}")
        if tuple(state[key].shape) != shape:
            raise WeightsError(
                f"{where} is not MobileNetV2 1.0: {key} has shape {list(state[key].shape)}, "
                f"expected {list(shape)}"
            )
        checked[key] = np.ascontiguousarray(state[key], np.float32)
        if not np.isfinite(checked[key]).all():
            raise WeightsError(f"{where} is damaged: {key} holds values that are not finite")
    return checked


def digest(state: State) -> str:
    """Return the sha256 of the backbone's values; it doesn't depend on the file's format."""
    sha = hashlib.sha256()
    for key, value in check(state, "the weights").items():
        sha.update(f"{key} {value.shape}\n".encode())
        sha.update(value.astype("<f4").tobytes())
    return sha.hexdigest()


def random_state(seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Return random weights that keep the signal's variance from layer to layer (He et al. 2015).

    torchvision's own initialisation relies on batch statistics, which an untrained network lacks.
    """
    rng = np.random.default_rng(seed)
    state: dict[str, npt.NDArray[np.float32]] = {}
    for conv in convs():
        fan_in = conv.shape[1] * conv.kernel**2
        std = np.sqrt((2.0 if conv.relu else 1.0) / fan_in)
        weight = rng.standard_normal(conv.shape) * std
        state[f"{conv.weight}.weight"] = weight.astype(np.float32)
        for part, value in zip(NORM, (1, 0, 0, 1), strict=True):
            state[f"{conv.norm}.{part}"] = np.full(conv.outputs, value, np.float32)
    return state


def preprocessing(image_size: int) -> dict[str, object]:
    """Return how a photo is prepared for the first convolution, to be stored with the weights."""
    return {
        "image_size": image_size,
        "resize": "stretch",
        "interpolation": "bilinear",
        "color": "RGB",
        "scale": 255,
        "mean": list(MEAN),
        "std": list(STD),
    }


def fold(state: State, conv: Conv) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return a convolution's weight and bias with its batch norm folded in, computed in float64."""
    gamma, beta, mean, var = (state[f"{conv.norm}.{part}"].astype(np.float64) for part in NORM)
    factor = gamma / np.sqrt(var + BN_EPSILON)
    weight = state[f"{conv.weight}.weight"].astype(np.float64) * factor[:, None, None, None]
    return weight.astype(np.float32), (beta - mean * factor).astype(np.float32)


def folded(state: State) -> dict[str, npt.NDArray[np.float32]]:
    """Return every convolution's weight and bias, its batch norm folded in: 104 tensors."""
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for conv in convs():
        tensors[f"{conv.weight}.weight"], tensors[f"{conv.weight}.bias"] = fold(state, conv)
    return tensors


def unfolded(state: State) -> dict[str, npt.NDArray[np.float32]]:
    """Return `folded` weights in the layout of `shapes`: each batch norm adds the bias.

    Their mean is 0 and their variance 1; the factor compensates for epsilon.
    """
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for conv in convs():
        bias = np.asarray(state[f"{conv.weight}.bias"], np.float32)
        ones, zeros = np.ones_like(bias), np.zeros_like(bias)
        tensors[f"{conv.weight}.weight"] = np.asarray(state[f"{conv.weight}.weight"], np.float32)
        tensors[f"{conv.norm}.weight"] = ones * np.float32(np.sqrt(1 + BN_EPSILON))
        tensors[f"{conv.norm}.bias"] = bias
        tensors[f"{conv.norm}.running_mean"], tensors[f"{conv.norm}.running_var"] = zeros, ones
    return tensors


def to_onnx(state: State, image_size: int, name: str, weights_digest: str) -> bytes:
    """Build the ONNX file: uint8 ``image`` [n, h, w, 3] in, float32 ``features`` [n, 1280] out.

    Normalisation is inside the graph, because a normalised photo is four times as many bytes to
    move; the file's metadata describes it. Runs on the driver: executors don't need ``onnx``.
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    nodes, constants = _graph(state)
    graph = helper.make_graph(
        nodes,
        "mobilenet_v2",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["n", image_size, image_size, 3])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["n", 1280])],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8, producer_name="pomona"
    )
    about = {
        "preprocessing": json.dumps(preprocessing(image_size), sort_keys=True),
        "weights": name,
        "weights_digest": weights_digest,
    }
    helper.set_model_props(model, about)
    checker.check_model(model)
    return bytes(model.SerializeToString())


def _graph(state: State) -> tuple[list[Any], dict[str, npt.NDArray[np.float32]]]:
    """Return the nodes (onnx.NodeProto) from `INPUT` to `OUTPUT`, and the constants they name."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Transpose", [INPUT], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planes"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "input_scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "input_shift"], ["normalised"]),
    ]
    mean, std = np.array(MEAN), np.array(STD)
    constants = {
        "input_scale": (1 / (255 * std)).astype(np.float32).reshape(1, 3, 1, 1),
        "input_shift": (-mean / std).astype(np.float32).reshape(1, 3, 1, 1),
        "zero": np.array(0, np.float32),
        "six": np.array(6, np.float32),
    }
    here = "normalised"
    for block in blocks():
        start = here
        for conv in block.convs:
            constants[f"{conv.weight}.w"], constants[f"{conv.weight}.b"] = fold(state, conv)
            nodes.append(_conv_node(conv, here))
            here = f"{conv.weight}.out"
            if conv.relu:
                relu = f"{conv.weight}.relu"
                nodes.append(helper.make_node("Clip", [here, "zero", "six"], [relu]))
                here = relu
        if block.residual:
            nodes.append(helper.make_node("Add", [start, here], [f"{here}.sum"]))
            here = f"{here}.sum"
    nodes.append(helper.make_node("GlobalAveragePool", [here], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], [OUTPUT]))
    return nodes, constants


def _conv_node(conv: Conv, source: str) -> Any:
    from onnx import helper

    return helper.make_node(
        "Conv",
        [source, f"{conv.weight}.w", f"{conv.weight}.b"],
        [f"{conv.weight}.out"],
        kernel_shape=[conv.kernel] * 2,
        strides=[conv.stride] * 2,
        pads=[conv.kernel // 2] * 4,
        group=conv.groups,
    )
