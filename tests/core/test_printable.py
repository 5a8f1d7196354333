"""Names of files and labels that hold commands: shown in full, and harmless."""

from __future__ import annotations

import io
import json
import logging
import sys
from typing import Any

import pyarrow as pa
import pytest

from pomona.core.printable import LogFormatter, cell, cells, escaped, json_line

EVIL = "a\n\x1b[2J\x9b2K\u202eb\u2028\x7f.jpg"
SHOWN = r"a\n\x1b[2J\x9b2K\u202eb\u2028\x7f.jpg"


def test_each_control_character_is_shown_and_all_else_is_left() -> None:
    assert escaped(EVIL) == SHOWN
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    assert escaped(escaped(every)) == escaped(every)
    assert escaped(every).encode()  # no half of a surrogate pair is left
    for kept in ("Pêche 1.jpg", "苹果", "سیب\u200cها", "👩\u200d🌾", "a\\n", "½\u00a0kg"):
        assert escaped(kept) == kept


def test_json_reads_back_exactly_and_holds_no_command() -> None:
    value = {"path": EVIL, "half": "\ud800", "n": [1.5, None]}
    line = json_line(value)
    assert json.loads(line) == value
    assert escaped(line) == line
    assert "é" in json_line("é")


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r"])
def test_a_cell_is_a_formula_only_if_nobody_minds(first: str) -> None:
    text = f'{first}HYPERLINK("x")\x1b'
    assert cell(text) == escaped(text)
    assert cell(text, csv_safe=True) == "'" + escaped(text)
    column = pa.chunked_array([["plain", None], [text]], pa.string())
    assert cells(column, csv_safe=True).to_pylist() == ["plain", None, "'" + escaped(text)]
    assert cells(column).to_pylist() == ["plain", None, escaped(text)]
    untouched = pa.chunked_array([["plain", "a=b"]], pa.string())
    assert cells(untouched, csv_safe=True) is untouched


def test_a_record_is_one_line_and_an_exception_cannot_pass_for_one() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter())
    log = logging.Logger("test")
    log.addHandler(handler)
    forged = "2026-12-01 00:00:00,000 INFO all is well\x1b[2J"
    log.warning("unreadable: %s", f"a\n{forged}")
    try:
        raise ValueError(f"b\n{forged}")
    except ValueError:
        log.exception("a bug")
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [lines[0], lines[1]]
    assert lines[0].endswith(rf" WARNING unreadable: a\n{escaped(forged)}")
    assert lines[-1] == f"    {escaped(forged)}"


def test_a_message_of_the_command_is_one_harmless_line(command: Any, tmp_path: Any) -> None:
    code, _, told = command("inspect", tmp_path / "a\x1b[2J")
    assert code == 2
    assert r"a\x1b[2J" in told
    code, _, told = command("inspect", "--no-such\x1b[2J")
    assert code == 2
    assert r"\x1b[2J" in told
    assert "\x1b" not in told
