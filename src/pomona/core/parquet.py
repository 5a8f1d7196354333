"""Tables as files: Parquet in small row groups, chunks for tasks, rows read by their position."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pomona.core.errors import DamagedError

ROWS_PER_GROUP = 1024
"""5 MB of features: a worker holds one row group at a time."""


class open_parquet:  # noqa: N801 - used as a function
    """A Parquet writer with row groups of `ROWS_PER_GROUP`, whatever the sizes of the batches.

    Each page has a checksum, which `gather` and `read_group` compare.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        repeated = [f.name for f in schema if f.type == pa.string() and f.name != "path"]
        self._writer = pq.ParquetWriter(
            path,
            schema,
            compression="zstd",
            use_dictionary=repeated,
            write_page_checksum=True,
        )
        self._waiting: list[pa.RecordBatch] = []
        self._rows = 0

    def __enter__(self) -> open_parquet:
        return self

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """Add rows."""
        while self._rows + batch.num_rows >= ROWS_PER_GROUP:
            room = ROWS_PER_GROUP - self._rows
            self._waiting.append(batch.slice(0, room))
            self._flush()
            batch = batch.slice(room)
        if batch.num_rows:
            self._waiting.append(batch)
            self._rows += batch.num_rows

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_batches(self._waiting), ROWS_PER_GROUP)
        self._waiting, self._rows = [], 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()


def write_chunks(path: Path, table: pa.Table, bounds: Sequence[int]) -> None:
    """Write a table as an Arrow file with one batch for each pair of neighbouring bounds."""
    table = table.combine_chunks()
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        for start, stop in itertools.pairwise(bounds):
            rows = table.slice(start, stop - start).combine_chunks().to_batches()
            writer.write_batch(rows[0] if rows else pa.RecordBatch.from_pylist([], table.schema))


def read_chunk(path: str, number: int) -> pa.RecordBatch:
    """Read one batch of `write_chunks`. Runs on workers."""
    with pa.OSFile(path, "rb") as file:
        return pa.ipc.open_file(file).get_batch(number)


def even_bounds(rows: int, most: int) -> list[int]:
    """Return the bounds of the fewest, most even pieces of at most ``most`` rows.

    >>> even_bounds(10, 4)
    [0, 3, 6, 10]
    >>> even_bounds(0, 4)
    [0]
    """
    pieces = -(-rows // most)
    return [rows * piece // pieces for piece in range(pieces + 1)] if pieces else [0]


def sliced(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Cut batches into slices of at most ``rows`` rows, in order and without a copy.

    >>> [len(b) for b in sliced([pa.record_batch({"n": range(5)})], 2)]
    [2, 2, 1]
    """
    for batch in batches:
        for start in range(0, batch.num_rows, rows):
            yield batch.slice(start, rows)


def gather(
    plan: pa.RecordBatch, root: str, files: Sequence[str], columns: list[str]
) -> Iterator[tuple[pa.RecordBatch, pa.Table]]:
    """Read rows by file and position, in the plan's order. Runs on workers.

    The plan's columns are ``file`` (index into ``files``, Parquet files relative to ``root``) and
    ``row`` (position in that file). Yields slices of the plan, each of at most `ROWS_PER_GROUP`
    rows, with their rows; columns that a file lacks are left out. Raises DamagedError for a file
    that can't be read.
    """

    # Plans mostly follow the files' order: two cached groups cover the seam between two slices,
    # and more would only cost memory.
    @functools.lru_cache(maxsize=2)
    def read(file: int, group: int) -> pa.Table:
        return read_group(root, files[file], group, columns)

    starts = functools.cache(lambda file: _group_starts(root, files[file]))
    for wanted in sliced([plan], ROWS_PER_GROUP):
        yield wanted, _take(wanted, read, starts)


def read_group(root: str, name: str, group: int, columns: list[str]) -> pa.Table:
    """Read columns of one row group. Raises DamagedError. Runs on workers."""
    with _reading(root, name) as file:
        return file.read_row_group(group, columns, use_threads=False)


def _group_starts(root: str, name: str) -> Any:
    with _reading(root, name) as file:
        sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    return np.concatenate([[0], np.cumsum(sizes)])


@contextlib.contextmanager
def _reading(root: str, name: str) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(Path(root, name), page_checksum_verification=True) as file:
            yield file
    except (OSError, pa.ArrowException) as error:  # a file that is gone, a footer, a page
        raise DamagedError(
            f"{Path(root, name)} is damaged: pomona extract --verify makes its rows again", name
        ) from error


def _take(
    wanted: pa.RecordBatch, read_group: Callable[..., pa.Table], starts: Callable[..., Any]
) -> pa.Table:
    numbers, places = wanted["file"].to_numpy(), wanted["row"].to_numpy()
    tables, order = [], []
    for file in np.unique(numbers):
        of_file = np.flatnonzero(numbers == file)
        groups = np.searchsorted(starts(int(file)), places[of_file], side="right") - 1
        for group in np.unique(groups):
            rows = of_file[groups == group]
            inside = places[rows] - starts(int(file))[group]
            tables.append(read_group(int(file), int(group)).take(pa.array(inside)))
            order.append(rows)
    back = np.argsort(np.concatenate(order), kind="stable")
    return pa.concat_tables(tables).take(pa.array(back))
