"""ONNX files from elsewhere: what they must hold, checked before ONNX Runtime reads them.

Runs on the driver: executors get bytes that were checked here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pomona.backbone.mobilenet import INPUT
from pomona.backbone.session import onnx_session, refusing
from pomona.core.errors import WeightsError

MOST_BYTES = 1 << 30
"""Of a file: ours have 6 to 20 MB, and protobuf ends at 2 GiB."""

MOST_NUMBERS = 1 << 28
"""Of a tensor whose shape the file fixes, by photo: 1 GiB as float32. Ours have up to 26 million,
with photos of 1024 pixels. A few bytes can ask for any size (ConstantOfShape, sparse tensors)."""

PHOTOS = 2
"""In the batch that a network is tried with: one would not show that it takes several."""


def check_onnx(content: bytes, where: str) -> None:
    """Check a file without running it.

    Raises
    ------
    WeightsError
        If it is no ONNX file, keeps data in other files, or asks for absurd sizes. A file beside
        it would be outside all digests, and the ONNX Runtime looks for it from the working
        directory; the special location for memory addresses would read this process's memory.
    """
    from google.protobuf.message import DecodeError
    from onnx import checker, load_from_string, shape_inference

    if len(content) > MOST_BYTES:
        raise WeightsError(f"{where} has {len(content):,} bytes: {MOST_BYTES:,} is the most")
    damaged = f"{where} is damaged, or no ONNX file: fetch or make it again"
    try:
        proto = load_from_string(content)
    except DecodeError as error:
        raise WeightsError(damaged) from error
    for tensor in _tensors(proto):
        _check_tensor(tensor, where)
    try:
        checker.check_model(content)
        shapes = shape_inference.infer_shapes(proto, data_prop=True).graph
    except (checker.ValidationError, shape_inference.InferenceError, ValueError) as error:
        raise WeightsError(damaged) from error
    for value in (*shapes.value_info, *shapes.output):
        _check_size(where, value.name, [d.dim_value for d in value.type.tensor_type.shape.dim])


def _tensors(message: Any) -> Iterator[Any]:
    """Give all tensors in a protobuf message: of subgraphs, attributes and functions, too."""
    if message.DESCRIPTOR.name in ("TensorProto", "SparseTensorProto"):
        yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in [value] if hasattr(value, "ListFields") else value:
                yield from _tensors(one)


def _check_tensor(tensor: Any, where: str) -> None:
    if tensor.DESCRIPTOR.name == "TensorProto":
        if tensor.data_location == tensor.EXTERNAL or tensor.external_data:
            raise WeightsError(
                f"{where} keeps {_shown(tensor.name)} in another file, which is refused: "
                "save it with all data inside (onnx.save_model without save_as_external_data)"
            )
        name = tensor.name
    else:
        name = tensor.values.name
    _check_size(where, name, tensor.dims)


def _check_size(where: str, name: str, sizes: Any) -> None:
    """Refuse an absurd shape; sizes of 0 are open, such as the number of photos."""
    if any(n < 0 for n in sizes) or math.prod(max(n, 1) for n in sizes) > MOST_NUMBERS:
        raise WeightsError(
            f"{where} asks for {_shown(name)} of {' × '.join(map(str, sizes))} numbers: "
            f"{MOST_NUMBERS:,} is the most"
        )


def try_network(
    content: bytes, image_size: int, widths: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Run a checked file on two pictures, and compare what it takes and gives.

    Parameters
    ----------
    content, image_size
        The file; the side of the pictures in pixels.
    widths
        The outputs that it must have, with their shapes less the number of photos.
    where
        What messages call it.

    Raises
    ------
    WeightsError
        If it can't be run, takes another input, lacks an output, or gives another shape, another
        type than float32, or numbers that aren't finite.
    """
    session = onnx_session(content, 1, where=where)
    with refusing(where):
        _check_input(session, image_size, where)
        _check_outputs(session, image_size, widths, where)


def _check_input(session: Any, image_size: int, where: str) -> None:
    puts = [(put.name, put.type, put.shape[1:]) for put in session.get_inputs()]
    if puts != [(INPUT, "tensor(uint8)", [image_size, image_size, 3])]:
        taken = ", ".join(f"{_shown(name)} {kind} {rest}" for name, kind, rest in puts)
        raise WeightsError(
            f"{where} takes {taken}; it must take {INPUT} alone, uint8 [n, {image_size}, "
            f"{image_size}, 3], at an image size of {image_size}"
        )


def _check_outputs(
    session: Any, image_size: int, widths: Mapping[str, tuple[int, ...]], where: str
) -> None:
    declared = {put.name: put for put in session.get_outputs()}
    for name, width in widths.items():
        if name not in declared or not _fits(declared[name], width):
            raise WeightsError(f"{where} has no output {_described(name, width)}")
    given = session.run(list(widths), {INPUT: _pictures(image_size)})
    for (name, width), value in zip(widths.items(), given, strict=True):
        if value.dtype != np.float32 or value.shape != (PHOTOS, *width):
            raise WeightsError(f"{where} has no output {_described(name, width)}")
        if not np.isfinite(value).all():
            raise WeightsError(f"{where} gives {name} that are not finite: its weights are damaged")


def _fits(output: Any, width: tuple[int, ...]) -> bool:
    """Tell whether an output's declared type and shape, where it has them, allow a width."""
    rest = output.shape[1:]
    return output.type == "tensor(float)" and (
        not output.shape
        or (
            len(rest) == len(width)
            and all(d in (w, None) or isinstance(d, str) for d, w in zip(rest, width, strict=True))
        )
    )


def _shown(name: str) -> str:
    """Return a name out of the file for a message: short, and on one line."""
    return repr(name if len(name) < 60 else f"{name[:60]}…") if name else "a tensor"


def _described(name: str, width: tuple[int, ...]) -> str:
    return f"{name}, float32 [{', '.join(['n', *map(str, width)])}]"


def _pictures(size: int) -> npt.NDArray[np.uint8]:
    """Return pictures [2, size, size, 3] of all values."""
    values = np.arange(PHOTOS * size * size * 3, dtype=np.uint32) * 37 % 256
    return values.astype(np.uint8).reshape(PHOTOS, size, size, 3)
