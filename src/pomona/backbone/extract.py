"""The backbone: `BackboneSpec`, `load`, and `extract`, the one function that everything calls.

The driver makes a spec with `make_spec`; it crosses to the workers with the weights' bytes in it,
so that no shared file system and no network is needed there. A worker builds its session once per
process and keeps it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pomona.backbone import mobilenet
from pomona.backbone.session import onnx_session
from pomona.backbone.spec import BackboneSpec
from pomona.core.schema import FEATURES
from pomona.photos import isolation
from pomona.photos.decoding import Photo, decode

Runner = Callable[[npt.NDArray[np.uint8]], list[npt.NDArray[np.float32]]]
"""From uint8 [n, h, w, 3] to one float32 [n, …] for each of the spec's outputs."""

SCORE = "score"
"""The output that is one number for each photo."""


@functools.lru_cache(maxsize=2)
def _session_of(spec: BackboneSpec) -> Any:
    return onnx_session(spec.payload, spec.threads, spec.device, spec.memory_share, spec.gpu)


@functools.lru_cache(maxsize=4)
def load_network(spec: BackboneSpec) -> Runner:
    """Build the network of a spec, once per process. Runs on workers.

    Specs that differ in their outputs alone share one session; it may be called from several
    threads at a time.

    Returns
    -------
    Runner
        From uint8 [n, image_size, image_size, 3] to the spec's outputs; ``features`` is
        float32 [n, 1280].
    """
    if spec.backend == "torch":
        from safetensors.numpy import load as load_safetensors

        from pomona.backbone.mobilenet_torch import build_runner

        state = load_safetensors(spec.payload)
        mixed = spec.precision == "mixed"
        device = f"cuda:{spec.gpu}" if spec.device == "cuda" else spec.device
        torch_runner = build_runner(state, device, mixed, spec.threads, spec.memory_share)
        return lambda image: [torch_runner(image)]
    session = _session_of(replace(spec, outputs=()))
    name = session.get_inputs()[0].name

    def run(image: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float32]]:
        return list(session.run(list(spec.outputs), {name: image}))

    return run


def extract(batches: Iterator[pa.RecordBatch], spec: BackboneSpec) -> Iterator[pa.RecordBatch]:
    """Turn photos into features: the one function of Spark, the service, predict and the tests.

    Runs on workers.

    Parameters
    ----------
    batches
        Record batches of any size with a column ``content`` (binary; null: it could not be read).
    spec
        What `make_spec` returned.

    Yields
    ------
    pa.RecordBatch
        One for each that came in, with as many rows in the same order: its columns less
        ``content``, then ``width``, ``height``, the spec's outputs (``features``: list<float32>,
        1280, or null) and ``error`` (code, or null).
    """
    for batch in batches:
        yield _with_features(batch, spec)


def _with_features(batch: pa.RecordBatch, spec: BackboneSpec) -> pa.RecordBatch:
    contents = batch.column("content")
    photos: list[Photo] = []
    parts: list[list[npt.NDArray[np.float32]]] = []
    for start in range(0, batch.num_rows, spec.batch_size):
        chunk = _decode(contents[start : start + spec.batch_size], spec)
        pixels = [photo.pixels for photo in chunk if photo.pixels is not None]
        if pixels:
            # One photo, as the service has it, isn't copied.
            parts.append(
                load_network(spec)(np.stack(pixels) if len(pixels) > 1 else pixels[0][np.newaxis])
            )
        photos += [photo._replace(pixels=None) for photo in chunk]
    missing = [photo.error is not None for photo in photos]
    columns = {
        "width": pa.array([photo.width for photo in photos], pa.int32()),
        "height": pa.array([photo.height for photo in photos], pa.int32()),
    }
    for number, name in enumerate(spec.outputs):
        columns[name] = _column([part[number] for part in parts], missing, name)
    columns["error"] = pa.array([photo.error for photo in photos], pa.string())
    kept = batch.drop_columns(["content"])
    fields = [pa.field(name, column.type) for name, column in columns.items()]
    return pa.RecordBatch.from_arrays(
        [*kept.columns, *columns.values()], schema=pa.schema([*kept.schema, *fields])
    )


def _column(parts: list[npt.NDArray[np.float32]], missing: list[bool], name: str) -> pa.Array:
    if name == mobilenet.OUTPUT:
        return feature_column(parts, missing, FEATURES)
    if not parts:  # no photo of this batch can be used: the width isn't known, and isn't needed
        return pa.nulls(len(missing), pa.float32() if name == SCORE else pa.list_(pa.float32()))
    if parts[0].ndim == 2:
        return feature_column(parts, missing, parts[0].shape[1])
    values = np.zeros(len(missing), np.float32)
    absent = np.asarray(missing, bool)
    values[~absent] = np.concatenate(parts)
    return pa.array(values, mask=absent if absent.any() else None)


def _decode(contents: pa.Array, spec: BackboneSpec) -> list[Photo]:
    views, size, most = contents.to_pylist(), spec.image_size, spec.pixels
    if spec.guard == "child":
        return [isolation.decode_apart(view, size, most) for view in views]
    with isolation.watched() if spec.guard else contextlib.nullcontext():
        if spec.threads == 1:
            return [decode(view, size, most) for view in views]
        # A GPU waits for pixels: Pillow releases the interpreter's lock while it decodes.
        return list(_pool(spec.threads).map(lambda view: decode(view, size, most), views))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def feature_column(
    parts: Sequence[npt.NDArray[np.float32]], missing: Sequence[bool], width: int = FEATURES
) -> pa.ListArray:
    """Put vectors into a list column, with null in the places of ``missing``.

    Parameters
    ----------
    parts
        float32 [m, width] each, together one row for each photo that isn't missing.
    missing
        For each photo, whether it has no features.
    width
        Of a vector.
    """
    values = np.concatenate(parts) if parts else np.zeros((0, width), np.float32)
    present = ~np.asarray(missing, bool)
    if values.shape != (present.sum(), width):
        raise ValueError(f"features of shape {values.shape} for {present.sum()} photos")
    if not np.isfinite(values).all():
        raise ValueError("the backbone gave features that are not finite: check the weights")
    offsets = np.zeros(len(present) + 1, np.int32)
    np.cumsum(present * width, out=offsets[1:])
    mask = None if present.all() else pa.array(~present)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()), mask=mask)


def features_of(column: pa.ChunkedArray | pa.Array) -> npt.NDArray[np.float32]:
    """Return a list column without nulls as float32 [n, 1280]."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    values: npt.NDArray[np.float32] = column.flatten().to_numpy()
    return values.reshape(len(column), FEATURES)
