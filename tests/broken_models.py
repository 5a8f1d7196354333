"""A model's folder, broken in every way that a model from elsewhere may be broken.

`whole` copies one that isn't: that of version 0.1, whose network is a few pixels' means.

Each way leaves the digests right, as whoever made the folder would: what is wrong is what it says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from pomona.model import artifact

Break = Callable[[Path], None]
BROKEN: dict[str, Break] = {}


def _way(name: str) -> Callable[[Break], Break]:
    def add(body: Break) -> Break:
        BROKEN[name] = body
        return body

    return add


def whole(folder: Path) -> Path:
    """Copy a small model, and return its folder."""
    shutil.copytree(Path(__file__).parent / "data" / "0.1" / "out" / "model", folder)
    return folder


def sealed(folder: Path) -> None:
    """Write the digests anew."""
    artifact.write_about(folder, json.loads((folder / "model.json").read_text()))


def _about(name: str, change: Callable[[dict[str, Any]], object]) -> None:
    def body(folder: Path) -> None:
        about = json.loads((folder / "model.json").read_text())
        change(about)
        artifact.write_about(folder, about)

    BROKEN[name] = body


def _bytes(name: str, file: str, content: bytes) -> None:
    def body(folder: Path) -> None:
        (folder / file).write_bytes(content)
        sealed(folder)

    BROKEN[name] = body


def _graph(name: str, change: Callable[[Any], object]) -> None:
    def body(folder: Path) -> None:
        proto = onnx.load(folder / "model.onnx")
        change(proto)
        (folder / "model.onnx").write_bytes(proto.SerializeToString())
        sealed(folder)

    BROKEN[name] = body


def _tensors(name: str, change: Callable[[dict[str, Any]], object]) -> None:
    def body(folder: Path) -> None:
        tensors = load_file(folder / "classifier.safetensors")
        change(tensors)
        save_file(tensors, folder / "classifier.safetensors")
        sealed(folder)

    BROKEN[name] = body


def _put(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Return a function that sets what lies at a path."""

    def change(about: dict[str, Any]) -> None:
        for name in path[:-1]:
            about = about[name]
        about[path[-1]] = value

    return change


# --- model.json --------------------------------------------------------------------------------

_about("no preprocessing", lambda about: about.pop("preprocessing"))
_about("preprocessing: no object", lambda about: about.update(preprocessing=[32]))
_about("preprocessing: only the size", lambda about: about.update(preprocessing={"image_size": 32}))
_about("preprocessing: another mean", lambda about: about["preprocessing"].update(mean=[0, 0, 0]))
_about("preprocessing: BGR", lambda about: about["preprocessing"].update(color="BGR"))
for _size in (31, 64, 1025, 10**9, "32", 32.5, None, True):
    _about(f"image_size: {_size!r}", _put("preprocessing", "image_size", value=_size))
_about("no unknown", lambda about: about.pop("unknown"))
_about("unknown method", lambda about: about["unknown"].update(method="magic"))
_about("method: no text", lambda about: about["unknown"].update(method=["distance"]))
for _value in (float("nan"), float("inf"), "0", None, True):
    _about(f"threshold: {_value!r}", _put("unknown", "threshold", value=_value))
for _value in (0, -1.0, float("nan"), float("inf"), "1", None, True):
    _about(f"temperature: {_value!r}", _put("temperature", value=_value))
for _value in (0, -0.5, float("nan"), "0.5", None):
    _about(f"power: {_value!r}", _put("power", value=_value))
_about("components don't fit", lambda about: about.update(components=5))
_about("no labels", lambda about: about.pop("labels"))
_about("labels: text", lambda about: about.update(labels="abc"))
_about("labels: one less", lambda about: about["labels"].pop())
_about("labels: one more", lambda about: about["labels"].append("more"))
_about("labels: one alone", lambda about: about.update(labels=["a"]))
_about("labels: twice", lambda about: about.update(labels=["a"] * len(about["labels"])))
_about("labels: empty text", lambda about: about["labels"].__setitem__(0, ""))
_about("labels: a number", lambda about: about["labels"].__setitem__(0, 3))
_about("no weights", lambda about: about.pop("weights"))
_about("weights: text", lambda about: about.update(weights="imagenet"))
_about("weights: no name", lambda about: about["weights"].pop("name"))
_about("format: true", lambda about: about.update(format=True))
_about("format: 0", lambda about: about.update(format=0))
_about("metrics: a number", lambda about: about.update(metrics=3))


def _raw(name: str, **changes: Any) -> None:
    """Write what `artifact.write_about` wouldn't write, with its digest."""

    def body(folder: Path) -> None:
        about = {**json.loads((folder / "model.json").read_text()), **changes}
        about["digest"] = artifact._own_digest(about)
        (folder / "model.json").write_text(json.dumps(about))

    BROKEN[name] = body


_raw("digests: a list", digests=[1, 2])
_raw("digests: none", digests={})
_raw("labels: half a surrogate", labels=["a", "\ud800"])


@_way("model.json: a deep list")
def _deep(folder: Path) -> None:
    (folder / "model.json").write_text("[" * 200_000)


@_way("model.json: empty")
def _empty(folder: Path) -> None:
    (folder / "model.json").write_bytes(b"")


@_way("model.json: too large")
def _large(folder: Path) -> None:
    with (folder / "model.json").open("ab") as file:
        file.truncate(1 << 32)  # a sparse file: it takes no space


@_way("model.onnx: too large")
def _large_onnx(folder: Path) -> None:
    with (folder / "model.onnx").open("ab") as file:
        file.truncate(1 << 34)


# --- model.onnx --------------------------------------------------------------------------------


def external(tensor: Any, location: str = "outside.bin") -> None:
    """Let a tensor's data lie in another file."""
    for one in ("raw_data", "float_data"):
        tensor.ClearField(one)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def _in_constant(proto: Any) -> None:
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "outside")
    external(tensor)
    proto.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))


def _in_branch(proto: Any) -> None:
    inner = numpy_helper.from_array(np.zeros(3, np.float32), "inner")
    external(inner)
    out = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [3])
    branch = helper.make_graph([], "branch", [], [out], [inner])
    yes = numpy_helper.from_array(np.array(True), "yes")
    proto.graph.initializer.append(yes)
    node = helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch)
    proto.graph.node.append(node)


def _in_sparse(proto: Any) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "sparse.indices")
    external(values)
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


def _in_function(proto: Any) -> None:
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "outside")
    external(tensor)
    node = helper.make_node("Constant", [], ["y"], value=tensor)
    opset = helper.make_opsetid("", 17)
    proto.functions.append(helper.make_function("own", "F", [], ["y"], [node], [opset]))


def _bomb(proto: Any) -> None:
    """A few bytes that ask for 40 GB."""
    shape = numpy_helper.from_array(np.array([100_000, 100_000], np.int64), "bomb.shape")
    proto.graph.initializer.append(shape)
    proto.graph.node.append(helper.make_node("ConstantOfShape", ["bomb.shape"], ["bomb"]))
    proto.graph.node.append(helper.make_node("ReduceMax", ["bomb"], ["most"], keepdims=0))
    old = proto.graph.output[1]
    (last,) = [node for node in proto.graph.node if "score" in node.output]
    last.output[0] = "score.before"
    proto.graph.node.append(helper.make_node("Add", ["score.before", "most"], [old.name]))


def _sparse_bomb(proto: Any) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "bomb")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "bomb.indices")
    sparse = helper.make_sparse_tensor(values, indices, [10**11])
    proto.graph.sparse_initializer.append(sparse)


def _replace_input(proto: Any, kind: int, shape: list[Any], name: str = "image") -> None:
    del proto.graph.input[:]
    proto.graph.input.append(helper.make_tensor_value_info(name, kind, shape))


def _rename_input(proto: Any) -> None:
    _replace_input(proto, TensorProto.UINT8, ["n", 32, 32, 3], "photo")
    for node in proto.graph.node:
        for n, name in enumerate(node.input):
            if name == "image":
                node.input[n] = "photo"


def _without(proto: Any, name: str) -> None:
    kept = [output for output in proto.graph.output if output.name != name]
    del proto.graph.output[:]
    proto.graph.output.extend(kept)


def _output(proto: Any, name: str, kind: int, shape: list[Any]) -> None:
    """Declare another type or shape."""
    (output,) = [output for output in proto.graph.output if output.name == name]
    output.CopyFrom(helper.make_tensor_value_info(name, kind, shape))


def _as_double(proto: Any) -> None:
    (last,) = [node for node in proto.graph.node if "score" in node.output]
    last.output[0] = "score.before"
    cast = helper.make_node("Cast", ["score.before"], ["score"], to=TensorProto.DOUBLE)
    proto.graph.node.append(cast)
    _output(proto, "score", TensorProto.DOUBLE, ["n"])


def _constant(proto: Any, name: str, change: Callable[[Any], Any]) -> None:
    """Change the value of an initializer."""
    for tensor in proto.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))


def _label_more(proto: Any) -> None:
    _constant(proto, "head.weight", lambda v: np.concatenate([v, v[:, :1]], axis=1))
    _constant(proto, "head.bias", lambda v: np.append(v, v[:1]))
    (output,) = [output for output in proto.graph.output if output.name == "probabilities"]
    output.type.tensor_type.shape.dim[1].dim_value += 1


def _fails_when_run(proto: Any) -> None:
    """What only a run shows: a shape that doesn't fit, with a declared one that does."""
    (last,) = [node for node in proto.graph.node if "score" in node.output]
    last.output[0] = "score.before"
    shape = numpy_helper.from_array(np.array([7], np.int64), "wrong.shape")
    proto.graph.initializer.append(shape)
    proto.graph.node.append(helper.make_node("Reshape", ["score.before", "wrong.shape"], ["score"]))


def _one_photo_only(proto: Any) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1


_bytes("model.onnx: text", "model.onnx", b"no network" * 100)
_bytes("model.onnx: empty", "model.onnx", b"")
_graph("model.onnx: no graph", lambda proto: proto.ClearField("graph"))
_graph("model.onnx: no operators", lambda proto: proto.graph.ClearField("node"))
_graph("operator of nobody's", lambda p: p.graph.node.append(helper.make_node("Nope", [], ["x"])))
_graph("operator set of the future", lambda p: setattr(p.opset_import[0], "version", 999))
_graph("external: initializer", lambda p: external(p.graph.initializer[0]))
_graph("external: absolute", lambda p: external(p.graph.initializer[0], "/etc/hostname"))
_graph("external: memory", lambda p: external(p.graph.initializer[0], "*/_ORT_MEM_ADDR_/*"))
_graph("external: constant", _in_constant)
_graph("external: branch", _in_branch)
_graph("external: sparse", _in_sparse)
_graph("external: function", _in_function)
_graph("bomb: shape", _bomb)
_graph("bomb: sparse", _sparse_bomb)
_graph("input: float", lambda p: _replace_input(p, TensorProto.FLOAT, ["n", 32, 32, 3]))
_graph("input: another size", lambda p: _replace_input(p, TensorProto.UINT8, ["n", 64, 64, 3]))
_graph("input: any size", lambda p: _replace_input(p, TensorProto.UINT8, ["n", "h", "w", 3]))
_graph("input: another name", _rename_input)
_graph(
    "input: two",
    lambda p: p.graph.input.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [1])),
)
_graph("input: one photo only", _one_photo_only)
for _name in ("probabilities", "score", "pca_features", "features"):
    _graph(f"output: no {_name}", partial(_without, name=_name))
_graph("output: double", _as_double)
_graph("output: a label more", _label_more)
_graph("output: NaN", lambda p: _constant(p, "head.linear", lambda v: v * np.float32(np.nan)))
_graph("output: fails when it is run", _fails_when_run)

# --- classifier.safetensors --------------------------------------------------------------------


def _change(tensors: dict[str, Any], name: str, to: Callable[[Any], Any] | None) -> None:
    value = tensors.pop(name)
    if to is not None:
        tensors[name] = to(value)


def _cut(value: Any) -> Any:
    return np.ascontiguousarray(value[..., :-1])


def _nan(value: Any) -> Any:
    return value * np.nan


def _as_bool(value: Any) -> Any:
    return value > 0


_bytes("tensors: text", "classifier.safetensors", b"no tensors" * 100)
_bytes("tensors: empty", "classifier.safetensors", b"")
for _name in ("mean", "linear", "weight", "bias", "detector.whitening", "detector.centres"):
    _tensors(f"tensors: no {_name}", partial(_change, name=_name, to=None))
    _tensors(f"tensors: {_name} of another shape", partial(_change, name=_name, to=_cut))
    _tensors(f"tensors: {_name} NaN", partial(_change, name=_name, to=_nan))
    _tensors(f"tensors: {_name} of another type", partial(_change, name=_name, to=_as_bool))
_tensors("tensors: weight infinite", lambda t: t.update(weight=t["weight"] + np.inf))
_tensors("tensors: every bias −∞", lambda t: t.update(bias=t["bias"] - np.inf))
_tensors("tensors: bias ∞", lambda t: t.update(bias=t["bias"] + np.inf))
