"""Photos to features: `extract_photos` on bytes, and `extract` on Arrow tables.

The driver makes a `BackboneSpec` with `make_spec`. It holds the weights' bytes, so that workers
need neither a shared file system nor the network. A worker builds its session once per process and
keeps it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pomona.backbone import mobilenet
from pomona.backbone.session import onnx_session, refusing
from pomona.backbone.spec import BackboneSpec, Runner
from pomona.core.errors import WeightsError
from pomona.core.schema import FEATURES
from pomona.photos import isolation
from pomona.photos.decoding import Photo, decode

SCORE = "score"
"""The one output that is a number for each photo; all others are vectors."""


@functools.lru_cache(maxsize=2)
def _session_of(spec: BackboneSpec) -> Any:
    return onnx_session(spec.payload, spec.threads, spec.device, spec.memory_share, spec.gpu)


@functools.lru_cache(maxsize=4)
def load_network(spec: BackboneSpec) -> Runner:
    """Build the network of a spec, once per process. Runs on workers.

    Specs that differ only in their outputs share one session. The function may be called from
    several threads at a time.
    """
    if spec.backend == "torch":
        from pomona.backbone.mobilenet_torch import build_runner

        return build_runner(spec)
    session = _session_of(replace(spec, outputs=()))
    name = session.get_inputs()[0].name

    def run(image: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float32]]:
        with refusing("the network"):
            return list(session.run(list(spec.outputs), {name: image}))

    return run


class Extracted(NamedTuple):
    """What `extract_photos` found in n photos, of which m can be used."""

    widths: list[int | None]  # [n], pixels, as each file says; None where it doesn't
    heights: list[int | None]
    errors: list[str | None]  # [n], a code for each photo; None: it can be used
    outputs: dict[str, npt.NDArray[np.float32]]  # the spec's, by name: [m, …]

    def by_photo(self, name: str) -> list[npt.NDArray[np.float32] | None]:
        """Return one row of an output for each photo, [n]; None where it can't be used."""
        rows = iter(self.outputs[name])
        return [next(rows) if error is None else None for error in self.errors]


def extract_photos(contents: Sequence[bytes | None], spec: BackboneSpec) -> Extracted:
    """Run the network on photos' bytes, `BackboneSpec.batch_size` at a time. Runs on workers.

    ``contents`` holds a file's bytes each; None: it could not be read.

    Raises
    ------
    WeightsError
        If the network can't be run, or an output holds NaN or infinity: the weights are at fault,
        not a photo.
    """
    photos: list[Photo] = []
    parts: list[list[npt.NDArray[np.float32]]] = []
    for start in range(0, len(contents), spec.batch_size):
        chunk = _decode(contents[start : start + spec.batch_size], spec)
        pixels = [photo.pixels for photo in chunk if photo.pixels is not None]
        if pixels:
            # One photo, as the service has it, isn't copied.
            batch = np.stack(pixels) if len(pixels) > 1 else pixels[0][np.newaxis]
            parts.append(load_network(spec)(batch))
        photos += [photo._replace(pixels=None) for photo in chunk]
    outputs = {
        name: np.concatenate([part[n] for part in parts]) if parts else _no_rows(name)
        for n, name in enumerate(spec.outputs)
    }
    if not all(np.isfinite(rows).all() for rows in outputs.values() if rows.ndim == 2):
        raise WeightsError("the network gave numbers that are not finite: check the weights")
    return Extracted(
        [photo.width for photo in photos],
        [photo.height for photo in photos],
        [photo.error for photo in photos],
        outputs,
    )


def _no_rows(name: str) -> npt.NDArray[np.float32]:
    """Return an output of no photos; only the features' width is known without the network."""
    width = FEATURES if name == mobilenet.OUTPUT else 0
    return np.zeros(0 if name == SCORE else (0, width), np.float32)


def extract(batches: Iterator[pa.RecordBatch], spec: BackboneSpec) -> Iterator[pa.RecordBatch]:
    """Turn tables of photos into tables of features: `extract_photos` for Arrow.

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
        photos = extract_photos(batch["content"].to_pylist(), spec)
        usable = np.array([error is None for error in photos.errors], bool)
        columns = {
            "width": pa.array(photos.widths, pa.int32()),
            "height": pa.array(photos.heights, pa.int32()),
            **{name: _column(rows, usable) for name, rows in photos.outputs.items()},
            "error": pa.array(photos.errors, pa.string()),
        }
        table = batch.drop_columns(["content"])
        for name, column in columns.items():
            table = table.append_column(name, column)
        yield table


def _column(rows: npt.NDArray[np.float32], usable: npt.NDArray[np.bool_]) -> pa.Array:
    if rows.ndim == 2:
        return feature_column(rows, usable, rows.shape[1])
    values = np.zeros(len(usable), np.float32)
    values[usable] = rows
    return pa.array(values, mask=None if usable.all() else ~usable)


def _decode(contents: Sequence[bytes | None], spec: BackboneSpec) -> list[Photo]:
    size, most = spec.image_size, spec.pixels

    def decoded(content: bytes | None) -> Photo:
        if spec.guard == "child":
            return isolation.decode_apart(content, size, most, spec.seconds)
        return decode(content, size, most)

    with isolation.watched() if spec.guard == "watch" else contextlib.nullcontext():
        if spec.threads == 1 or len(contents) == 1:
            return [decoded(content) for content in contents]
        # A GPU waits for pixels: Pillow releases the interpreter's lock while it decodes.
        return list(_pool(spec.threads).map(decoded, contents))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def feature_column(
    rows: npt.NDArray[np.float32], usable: npt.NDArray[np.bool_], width: int = FEATURES
) -> pa.ListArray:
    """Put vectors [m, width] into a list column [n], null where a photo isn't usable: bool [n]."""
    if rows.shape != (usable.sum(), width):
        raise ValueError(f"features of shape {rows.shape} for {usable.sum()} photos")
    offsets = np.zeros(len(usable) + 1, np.int32)
    np.cumsum(usable * width, out=offsets[1:])
    mask = None if usable.all() else pa.array(~usable)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.ravel()), mask=mask)


def features_of(column: pa.ChunkedArray | pa.Array) -> npt.NDArray[np.float32]:
    """Return a list column without nulls as float32 [n, 1280], the inverse of `feature_column`."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    values: npt.NDArray[np.float32] = column.flatten().to_numpy()
    return values.reshape(len(column), FEATURES)
