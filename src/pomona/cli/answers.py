"""Answers of ``predict`` for people and machines: a table, CSV, or one JSON object a line."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator
from typing import IO, Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from pomona.model.artifact import Model

Show = Callable[[pa.RecordBatch], None]

CSV = ("path", "label", "probability", "unknown", "reason", "score", "nearest", "error")


@contextlib.contextmanager
def printer(
    stream: IO[str], found: Model, *, as_json: bool, as_csv: bool
) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """Give a function that shows answers, as `pomona.pipeline.predict.ROWS`.

    JSON and CSV go out as they come, unless on a terminal, where a progress bar is shown meanwhile.
    """
    rows: list[dict[str, Any]] = []
    writer: Callable[[list[dict[str, Any]]], None]
    if as_json:
        writer = lambda some: _json(stream, found, some)  # noqa: E731
    elif as_csv:
        sheet = csv.DictWriter(stream, CSV, lineterminator="\n")
        sheet.writeheader()
        writer = lambda some: _csv(sheet, some)  # noqa: E731
    else:
        writer = lambda some: _table(stream, some)  # noqa: E731
    at_once = (as_json or as_csv) and not stream.isatty()

    def show(batch: pa.RecordBatch) -> None:
        rows.extend(batch.to_pylist())
        if at_once:
            writer(rows)
            rows.clear()

    yield show
    if rows:
        writer(rows)
    stream.flush()


def _json(stream: IO[str], found: Model, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        nearest = _nearest(row)
        pairs = [{"label": label, "probability": round(p, 6)} for label, p in nearest]
        told = {**row, "nearest": pairs, "model": found.version}
        for name in ("probability", "score"):
            told[name] = None if row[name] is None else round(row[name], 6)
        del told["probabilities"]
        stream.write(json.dumps(told, ensure_ascii=False, sort_keys=True) + "\n")


def _csv(sheet: csv.DictWriter[str], rows: list[dict[str, Any]]) -> None:
    for row in rows:
        nearest = "; ".join(f"{label} {p:.4f}" for label, p in _nearest(row))
        sheet.writerow({**{name: row[name] for name in CSV}, "nearest": nearest})


def _nearest(row: dict[str, Any]) -> list[tuple[str, float]]:
    return list(zip(row["nearest"] or [], row["probabilities"] or [], strict=True))


def _table(stream: IO[str], rows: list[dict[str, Any]]) -> None:
    table = Table("photo", "answer", "nearest", "why unknown", box=None, pad_edge=False)
    for row in rows:
        nearest = ", ".join(f"{label} {p:.1%}" for label, p in _nearest(row))
        table.add_row(row["path"], _answer(row), nearest, row["reason"] or "")
    if all(row["reason"] is None for row in rows):
        table.columns.pop()
    terminal = stream.isatty()
    console = Console(file=stream, width=None if terminal else 1000, emoji=False, markup=False)
    console.print(table, markup=False, highlight=False)


def _answer(row: dict[str, Any]) -> str:
    if row["error"]:
        return f"can't be used: {row['error']}"
    return "unknown" if row["unknown"] else str(row["label"])


def summary(record: dict[str, Any]) -> Table:
    """Return what a `predict` with ``--out`` did."""
    table = Table.grid(padding=(0, 2))
    rejected = ", ".join(f"{n:,} {code}" for code, n in record["rejected"].items())
    most = ", ".join(f"{label} {n:,}" for label, n in list(record["labels"].items())[:5])
    speed = record["photos"] / max(record["seconds"], 1e-9)
    table.add_row("photos", f"{record['photos']:,} in {record['seconds']:.1f} s, {speed:.0f}/s")
    table.add_row("labels", most or "none")
    table.add_row("unknown", f"{record['unknown']:,}")
    table.add_row("can't be used", rejected or "0")
    table.add_row("answers", f"{record['out']} (Parquet)")
    return table
