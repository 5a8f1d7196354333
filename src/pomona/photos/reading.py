"""Reading the bytes of photos by path or URI, one at a time or for record batches."""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pomona.core.errors import SourceError, first_line
from pomona.core.object_store import READ_AHEAD, connect, retrying
from pomona.core.uris import local_path
from pomona.photos.source import MAX_BYTES, SCHEME, Source, open_source

log = logging.getLogger("pomona")

Reader = Callable[[str], bytes]


def reader(source: Source) -> Reader:
    """Return a function from a photo's relative path to its bytes. Runs on workers.

    The function raises OSError. It reads at most `MAX_BYTES` + 1 bytes, which is enough to see that
    a file is too large.
    """

    def read_local(path: str) -> bytes:
        with Path(source.root, path).open("rb") as file:
            return file.read(MAX_BYTES + 1)

    def read_object(path: str) -> bytes:
        with connect(source.store).open_input_file(f"{source.root}/{path}") as file:
            return bytes(file.read(MAX_BYTES + 1))

    if source.kind == "local":
        return read_local
    return lambda path: retrying(lambda: read_object(path))


def read_uri(text: str) -> bytes:
    """Read a photo by its path or URI (local, ``file:``, ``s3://``, ``gs://``). Runs on workers.

    Raises OSError if it can't be read, or only Hadoop can read such URIs.
    """
    try:
        scheme = re.match(SCHEME, text)
        if scheme is None or scheme[1].lower() == "file" or Path(text).is_file():
            path = local_path(text)
            return reader(Source(text, "local", os.fspath(path.parent)))(path.name)
        source = open_source(text)
        if source.kind == "hadoop":
            raise OSError("only Hadoop reads this URI: read it with binaryFile, and give the bytes")
        folder, _, name = source.root.rpartition("/")
        return reader(replace(source, root=folder))(name)
    except (SourceError, ValueError) as error:
        raise OSError(first_line(error)) from error


def read(photos: Iterator[pa.RecordBatch], source: Source) -> Iterator[pa.RecordBatch]:
    """Add the column ``content``: the file's bytes, or null if they can't be read. Runs on workers.

    The column ``path`` is relative to the source. One batch's bytes are in memory at a time, and
    on an object store those of the next `READ_AHEAD` files, which are read ahead.
    """
    return _read(photos, reader(source), ahead=source.kind != "local")


def read_uris(photos: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Like `read`, for batches whose ``path`` is a full path or URI, or null. Runs on workers."""
    return _read(photos, read_uri, ahead=True)


def _read(
    photos: Iterator[pa.RecordBatch], read_one: Reader, ahead: bool
) -> Iterator[pa.RecordBatch]:
    def content(path: str | None) -> bytes | None:
        try:
            return None if path is None else read_one(path)
        except OSError as error:  # the table gets an error code, the log the reason
            log.warning("unreadable: %s: %s", path, first_line(error))
            return None

    if not ahead:
        for batch in photos:
            yield with_content(batch, [content(path) for path in batch["path"].to_pylist()])
        return
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        under_way: deque[tuple[pa.RecordBatch, list[Any]]] = deque()
        for batch in photos:
            under_way.append((batch, [pool.submit(content, p) for p in batch["path"].to_pylist()]))
            while sum(len(futures) for _, futures in under_way) > READ_AHEAD + batch.num_rows:
                first, futures = under_way.popleft()
                yield with_content(first, [future.result() for future in futures])
        for first, futures in under_way:
            yield with_content(first, [future.result() for future in futures])


def with_content(batch: pa.RecordBatch, contents: list[bytes | None]) -> pa.RecordBatch:
    """Append the column ``content`` to a batch of photos."""
    return pa.RecordBatch.from_arrays(
        [*batch.columns, pa.array(contents, pa.binary())],
        schema=batch.schema.append(pa.field("content", pa.binary())),
    )
