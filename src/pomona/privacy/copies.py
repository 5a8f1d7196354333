"""Clean the copies of photos' names and numbers in OUT, each file by itself, in place.

These are the log, the record of where OUT was pushed to, MLflow's store and the answers of
`predict`. Cleaning twice does no harm: a forget that was killed starts here again.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from pomona.core.errors import RequestError
from pomona.core.files import UNFINISHED, atomic_file, read_json, write_json
from pomona.privacy.names_in_text import A_PHOTO, Names, cell_forms
from pomona.privacy.occurrences import DERIVED, Occurrences
from pomona.workspace.feature_table import read_rejected
from pomona.workspace.layout import Out

STORE, ARTIFACTS = "mlflow.db", "mlflow-artifacts"
OWN = {
    *DERIVED,
    *("features", "report", "export", "forgotten", "_work", "rejected.csv", "manifest.json"),
    *("weights.safetensors", "weights.json", ".finetune"),
    *("pomona.log", ".lock", ".places.json", STORE, ARTIFACTS),
    *(f"{STORE}-{end}" for end in ("wal", "shm", "journal")),
}
"""The names in OUT that are Pomona's."""

BINARY = (".onnx", ".safetensors", ".png")
"""Files that hold numbers or pixels: no name is looked for in them."""


@dataclass
class Copies:
    """What was done to the copies; in the receipt as it is."""

    log_lines: int = 0  # removed from the log
    values: int = 0  # of MLflow's database that named a photo
    rewritten: int = 0  # files and folders of MLflow's store
    removed: int = 0  # files and folders of MLflow's store
    answers: int = 0  # rows removed from `predict`'s answers in OUT
    left: list[str] = field(default_factory=list)
    """Files in OUT that aren't Pomona's and name a photo: they are not touched."""


def clean(
    out: Out, occurrences: Occurrences, saw_photo: Callable[[dict[str, Any]], bool]
) -> Copies:
    """Clean all copies in OUT. Raises RequestError if MLflow's database is in use.

    ``saw_photo`` tells from a ``model.json`` whether that model may have been trained with a photo;
    copies of such models in MLflow's store are removed.
    """
    names, done = occurrences.names, Copies()
    done.log_lines = _clean_log(out.log, names)
    _clean_places(out.places, occurrences)
    done.values = _clean_database(out.root / STORE, names)
    for artifacts in sorted((out.root / ARTIFACTS).glob("*/artifacts")):
        _clean_artifacts(artifacts, names, saw_photo, done)
    for path in sorted(out.root.iterdir()):
        if path.name not in OWN:
            _clean_other(out, path, occurrences, done)
    for part in out.root.rglob(".*.part"):
        if UNFINISHED.fullmatch(part.name):
            part.unlink(missing_ok=True)
    return done


def _clean_log(log: Path, names: Names) -> int:
    """Remove the lines that name any photo: a log may cut or escape a name in ways of its own.

    A name that holds line breaks may stand in several lines: all of them go. The file is written in
    place: this process and a JVM may have it open to append to it.
    """
    if not log.exists():
        return 0
    content = log.read_bytes()
    lines = content.splitlines(keepends=True)
    ends = [0, *itertools.accumulate(map(len, lines))]
    gone = {n for n, line in enumerate(lines) if A_PHOTO.search(line)}
    for start, end in names.spans(content):
        gone.update(range(bisect.bisect_right(ends, start) - 1, bisect.bisect_left(ends, end)))
    kept = [line for n, line in enumerate(lines) if n not in gone]
    if len(kept) < len(lines):
        with log.open("r+b") as file:
            file.write(b"".join(kept))
            file.truncate()
    return len(lines) - len(kept)


def _clean_places(file: Path, occurrences: Occurrences) -> None:
    """Remove the files that name a photo, or may name a lost label, from what places hold.

    The next push then looks at those files there again.
    """
    record = read_json(file)
    for place in record.get("places", {}).values():
        place["files"] = {
            name: entry
            for name, entry in place.get("files", {}).items()
            if not (occurrences.in_derived and name.partition("/")[0] in DERIVED)
            and not occurrences.names.are_in(name.encode())
        }
    if record:
        write_json(file, record)


def _clean_database(database: Path, names: Names) -> int:
    """Replace names in MLflow's database, and leave no free page that could hold an old value."""
    if not database.exists():
        return 0
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=10, isolation_level=None)) as db:
            db.execute("pragma secure_delete = on")
            db.execute("begin immediate")
            tables = db.execute(
                "select name from sqlite_master where type = 'table' and sql is not null"
            ).fetchall()
            own = [name for (name,) in tables if not name.startswith("sqlite_")]
            count = sum(_clean_table(db, name, names) for name in own)
            db.execute("commit")
            db.execute("vacuum")
            db.execute("pragma wal_checkpoint(truncate)")
            return count
    except sqlite3.Error as error:
        raise RequestError(
            f"{database} can't be cleaned ({error}): stop the MLflow server that uses it, and run "
            "the same command again"
        ) from error


def _clean_table(db: sqlite3.Connection, name: str, names: Names) -> int:
    table = _quoted(name)
    cursor = db.execute(f"select rowid, * from {table}")
    columns = [_quoted(description[0]) for description in cursor.description[1:]]
    changes = [
        (column, names.replaced(value), row[0])
        for row in cursor
        for column, value in zip(columns, row[1:], strict=True)
        if isinstance(value, str) and names.replaced(value) != value
    ]
    for column, value, rowid in changes:
        db.execute(f"update {table} set {column} = ? where rowid = ?", (value, rowid))
    return len(changes)


def _quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'


def _clean_artifacts(
    folder: Path, names: Names, saw_photo: Callable[[dict[str, Any]], bool], done: Copies
) -> None:
    """Clean the files of one run: reports, lists, and copies of the model."""
    for model in sorted(folder.rglob("model.json")):
        if saw_photo(read_json(model)):
            shutil.rmtree(model.parent)
            done.removed += 1
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if names.are_in(path.name.encode()):
            path.unlink()
            done.removed += 1
        elif path.suffix not in BINARY and names.are_in_file(path):
            if _rewrite(path, names):
                done.rewritten += 1
            else:  # a report: its thumbnails lie in one picture
                path.unlink()
                done.removed += 1


def _rewrite(path: Path, names: Names) -> bool:
    """Write a list or JSON without the photos. Returns whether no name is left in it."""
    if path.name == "rejected.csv":
        rows = read_rejected(path)
        paths = {form for path in names.paths for form in cell_forms(path)}
        is_named = pc.is_in(rows["path"], pa.array(sorted(paths), pa.string()))
        with atomic_file(path) as part:
            pcsv.write_csv(rows.filter(pc.invert(is_named)), part)
        return True
    if path.suffix != ".json":
        return False
    write_json(path, names.pruned(read_json(path)))
    return not names.are_in_file(path)


def _clean_other(out: Out, path: Path, occurrences: Occurrences, done: Copies) -> None:
    """Clean the answers of `predict`; of other files only note that they name a photo."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    answers = {file.parent for file in files if file.name == "_answers.json"}
    for file in files:
        if file.parent in answers and file.name == "_todo.arrow":
            file.unlink()
        elif file.parent in answers and file.suffix == ".parquet":
            done.answers += _clean_answers(file, occurrences.paths)
        elif occurrences.names.are_in(str(file).encode()) or occurrences.names.are_in_file(file):
            done.left.append(occurrences.names.replaced(file.relative_to(out.root).as_posix()))


def _clean_answers(file: Path, paths: frozenset[str]) -> int:
    rows = pq.ParquetFile(file).read()
    is_named = [_ends_with_any(path, paths) for path in rows["path"].to_pylist()]
    if any(is_named):
        with atomic_file(file) as part:
            pq.write_table(rows.filter(pc.invert(pa.array(is_named))), part)
    return sum(is_named)


def _ends_with_any(path: str, paths: frozenset[str]) -> bool:
    """Tell whether a path is one of some, or one of them below some folder."""
    parts = path.split("/")
    return any("/".join(parts[first:]) in paths for first in range(len(parts)))
