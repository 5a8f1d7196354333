"""Answers of ``predict`` for people and machines: a table, CSV, or one JSON object a line."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

import pyarrow as pa

from pomona.cli import render, work
from pomona.core.printable import cell, json_line
from pomona.model.artifact import Model
from pomona.model.recogniser import to_json

CSV = ("path", "label", "probability", "unknown", "reason", "score", "nearest", "error")
Row = dict[str, Any]


@contextlib.contextmanager
def printer(
    stream: IO[str], model: Model, *, as_json: bool, as_csv: bool, csv_safe: bool = False
) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """Give a function that shows answers, as `pomona.pipeline.predict.ROWS`.

    With ``csv_safe`` no text of CSV is a formula.

    JSON and CSV go out as they come, unless on a terminal, where a progress bar is shown meanwhile.
    """
    rows: list[Row] = []
    write: Callable[[list[Row]], None]
    if as_json:
        write = partial(_json, stream, model.version)
    elif as_csv:
        sheet = csv.DictWriter(stream, CSV, lineterminator="\n")
        sheet.writeheader()
        write = partial(_csv, sheet, csv_safe)
    else:
        write = partial(_table, stream)
    at_once = (as_json or as_csv) and not stream.isatty()

    def show(batch: pa.RecordBatch) -> None:
        rows.extend(batch.to_pylist())
        if at_once:
            write(rows)
            rows.clear()

    yield show
    if rows:
        write(rows)
    stream.flush()


def _json(stream: IO[str], version: str, rows: list[Row]) -> None:
    for row in rows:
        answer = {**to_json(row), "model": version}
        stream.write(json_line(answer) + "\n")


def _csv(sheet: csv.DictWriter[str], csv_safe: bool, rows: list[Row]) -> None:
    def shown(value: Any) -> Any:  # numbers stay numbers: -1.5 is a score, not a formula
        return cell(value, csv_safe=csv_safe) if isinstance(value, str) else value

    for row in rows:
        nearest = "; ".join(f"{label} {p:.4f}" for label, p in _nearest(row))
        values = {**{name: row[name] for name in CSV}, "nearest": nearest}
        sheet.writerow({name: shown(value) for name, value in values.items()})


def _nearest(row: Row) -> list[tuple[str, float]]:
    return list(zip(row["nearest"] or [], row["probabilities"] or [], strict=True))


def _table(stream: IO[str], rows: list[Row]) -> None:
    table = render.table("photo", "answer", "nearest", "why unknown")
    for row in rows:
        nearest = ", ".join(f"{label} {p:.1%}" for label, p in _nearest(row))
        render.add_row(table, row["path"], _answer(row), nearest, row["reason"] or "")
    if all(row["reason"] is None for row in rows):
        table.columns.pop()
    work.write(stream, table)


def _answer(row: Row) -> str:
    if row["error"]:
        return f"can't be used: {row['error']}"
    return "unknown" if row["unknown"] else str(row["label"])


def summary(record: dict[str, Any]) -> render.Rows:
    """Return what a `predict` with ``--out`` did."""
    rejected = ", ".join(f"{n:,} {code}" for code, n in record["rejected"].items())
    most = ", ".join(f"{label} {n:,}" for label, n in list(record["labels"].items())[:5])
    speed = record["photos"] / max(record["seconds"], 1e-9)
    return [
        ("photos", f"{record['photos']:,} in {record['seconds']:.1f} s, {speed:.0f}/s"),
        ("labels", most or "none"),
        ("unknown", f"{record['unknown']:,}"),
        ("can't be used", rejected or "0"),
        ("answers", f"{record['out']} (Parquet)"),
    ]
