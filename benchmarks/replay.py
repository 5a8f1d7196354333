"""An exported file once more in PyTorch, node by node, for converters that start from there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pomona.core.errors import RequestError

Values = list[torch.Tensor]
Attributes = dict[str, Any]


class Replay(nn.Module):
    """A graph of the nodes in `KINDS`: uint8 ``image`` in, the file's outputs out, by name."""

    def __init__(self, file: Path) -> None:
        from onnx import helper, load, numpy_helper

        super().__init__()
        graph = load(file).graph
        for tensor in graph.initializer:
            value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
            self.register_buffer(_plain(tensor.name), value)
        self.nodes: list[tuple[str, list[str], str, Attributes]] = []
        for node in graph.node:
            if node.op_type not in KINDS:
                raise RequestError(
                    f"{file} has a {node.op_type}: take phone.onnx, the float32 file"
                )
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            names = [_plain(name) for name in node.input]
            self.nodes.append((node.op_type, names, _plain(node.output[0]), attributes))
        self.outputs = [output.name for output in graph.output]

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        values = {"image": image, **dict(self.named_buffers())}
        for kind, names, output, attributes in self.nodes:
            values[output] = KINDS[kind]([values[name] for name in names], attributes)
        return {name: values[name] for name in self.outputs}


def _plain(name: str) -> str:
    return name.replace(".", "_")  # no dots in the names of a module's buffers


def _convolve(x: Values, a: Attributes) -> torch.Tensor:
    pad = a["pads"][0]  # the same on all four sides
    return nn.functional.conv2d(x[0], x[1], x[2], a["strides"], pad, groups=a["group"])


def _kept(a: Attributes) -> bool:
    return bool(a.get("keepdims", 1))


KINDS: dict[str, Callable[[Values, Attributes], torch.Tensor]] = {
    "Abs": lambda x, _: x[0].abs(),
    "Add": lambda x, _: x[0] + x[1],
    "Cast": lambda x, _: x[0].float(),
    "Clip": lambda x, _: x[0].clamp(x[1], x[2]),
    "Conv": _convolve,
    "Flatten": lambda x, _: x[0].flatten(1),
    "GlobalAveragePool": lambda x, _: x[0].mean((2, 3), keepdim=True),
    "MatMul": lambda x, _: x[0] @ x[1],
    "Mul": lambda x, _: x[0] * x[1],
    "Pow": lambda x, _: x[0] ** x[1],
    "ReduceLogSumExp": lambda x, a: x[0].logsumexp(a["axes"], _kept(a)),
    "ReduceMax": lambda x, a: x[0].amax(a["axes"], _kept(a)),
    "ReduceSumSquare": lambda x, a: (x[0] * x[0]).sum(a["axes"], _kept(a)),
    "Sign": lambda x, _: x[0].sign(),
    "Softmax": lambda x, a: x[0].softmax(a["axis"]),
    "Squeeze": lambda x, _: x[0].squeeze(1),
    "Sub": lambda x, _: x[0] - x[1],
    "Transpose": lambda x, a: x[0].permute(a["perm"]),
}
"""Of opset 17, as far as `pomona.backbone.mobilenet` and `pomona.model.artifact` use them."""
