"""Which photos are meant: exact paths, patterns, and lists in a file."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pomona.core.errors import RequestError, SourceError
from pomona.core.files import read_json
from pomona.photos.reading import reader
from pomona.photos.source import open_source
from pomona.workspace import tombstones
from pomona.workspace.layout import Out

_WILDCARDS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def read_list(file: str) -> tuple[str, ...]:
    """Return the lines of a file, or of standard input (``-``); refuse a file without any."""
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        lines = [line for line in re.split(r"\r?\n", content.decode()) if line]
    except OSError as error:
        raise RequestError(f"--list {file} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"--list {file} is not UTF-8") from error
    if not lines:
        raise RequestError(f"--list {file} holds no paths: one on each line")
    return tuple(lines)


def matcher(pattern: str) -> str:
    r"""Return a pattern as a case-sensitive regular expression over whole paths.

    ``*`` and ``?`` stay within a folder, ``**`` crosses folders, ``[…]`` is one of some characters.

    >>> matcher("Training/*/a?.jpg")
    'Training/[^/]*/a[^/]\\.jpg'
    >>> matcher("**/x[0-9].png")
    '(?:.*/)?x[0-9]\\.png'
    """
    expression = ""
    for part in re.findall(r"\*\*/|\*\*|\*|\?|\[[!^]?\]?[^\]]+\]|.", pattern, re.S):
        if part in _WILDCARDS:
            expression += _WILDCARDS[part]
        elif part.startswith("[") and len(part) > 1:
            inside = re.sub(r"([\\[&~|])", r"\\\1", part[1:-1]).replace("--", r"-\-")
            expression += "[" + re.sub("^!", "^", inside) + "]"
        else:
            expression += re.escape(part)
    return expression


def select(
    out: Out,
    known: pa.Array,
    photos: Sequence[str],
    listed: Sequence[str] = (),
    *,
    missing_ok: bool = False,
    may_be_gone: bool = False,
) -> frozenset[str]:
    """Return the paths of the photos that are meant.

    ``known`` are all paths in OUT's tables. ``photos`` are paths as in the table, with or without
    the source's address in front, or patterns; ``listed`` are exact paths only. Refused are exact
    paths that neither the tables nor the source hold, unless ``missing_ok``, and patterns that
    match nothing, unless they ``may_be_gone``: an interrupted forget may have erased their photos.
    """
    address = f"{read_json(out.table_file)['source'].rstrip('/')}/"
    patterns = {name.removeprefix(address) for name in photos}
    names = patterns | {name.removeprefix(address) for name in listed}
    in_tables = known.filter(pc.is_in(known, pa.array(sorted(names), pa.string())))
    selected = set(in_tables.to_pylist())
    stones = tombstones.read(out)
    absent = []
    for name in sorted(names - selected):
        if missing_ok or stones.id_of(name) in stones.ids:
            selected.add(name)
        elif name in patterns and re.search(r"[*?\[]", name):
            matches = _matching(name, known)
            if not matches and not may_be_gone:
                raise RequestError(
                    f"{name} matches no photo in {out.root}: * stays within a folder, ** crosses "
                    "folders, case counts"
                )
            selected.update(matches)
        else:
            absent.append(name)
    in_source = _in_source(out, absent)
    if missing := [name for name in absent if name not in in_source]:
        raise RequestError(
            f"{first_of(missing)} is neither in the tables of {out.root} nor in its source: give "
            "paths as in the column path, or --missing-ok to take them anyway"
        )
    return frozenset(selected | in_source)


def first_of(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    return names[0] + (f" (and {len(names) - 1:,} more)" if len(names) > 1 else "")


def _matching(pattern: str, known: pa.Array) -> list[str]:
    try:
        expression = re.compile(matcher(pattern), re.DOTALL)
    except re.error as error:
        raise RequestError(f"{pattern} is not a pattern: {error}") from error
    return [path for path in known.to_pylist() if expression.fullmatch(path)]


def _in_source(out: Out, paths: Iterable[str]) -> set[str]:
    """Return the paths that lie in the source; none where it is out of reach."""
    try:
        source = open_source(read_json(out.table_file)["source"])
    except SourceError:
        return set()
    if source.kind == "hadoop":
        return set()
    read, readable = reader(source), set()
    for path in paths:
        if ".." not in Path(path).parts and not Path(path).is_absolute():
            with contextlib.suppress(OSError, SourceError):
                read(path)
                readable.add(path)
    return readable
