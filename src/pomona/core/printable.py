"""Text of others (names of files, labels, errors) made safe to show: terminals, logs, CSV.

A file may be called anything but ``/``. Written as it is, a name could clear a terminal, add a line
to a log, or be run by a spreadsheet as a formula.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

COMMANDS = "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
"""Control characters, line separators, and what reverses text (Unicode's bidi controls)."""
_UNSAFE = re.compile(f"[{COMMANDS}\ud800-\udfff]")  # half a surrogate pair can't be written
_UNSAFE_IN_JSON = re.compile(f"[\x7f-\x9f{COMMANDS[COMMANDS.index(chr(0x2028)) :]}\ud800-\udfff]")
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters of a cell that spreadsheets run (OWASP, CSV Injection)."""
INDENT = "    "
"""Before the lines of an exception in a log: none of them can pass for the log's own."""


def escaped(text: str) -> str:
    r"""Return a text as one line without commands: control characters as Python writes them.

    >>> print(escaped("Pêche\n\x1b[2J.jpg"))
    Pêche\n\x1b[2J.jpg
    """
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def json_line(value: Any) -> str:
    r"""Return a value as JSON that reads back exactly, without a character that is a command.

    >>> print(json_line({"label": "é\x9b2J"}))
    {"label": "é\u009b2J"}
    """
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def cell(text: str, *, csv_safe: bool = False) -> str:
    r"""Return a text as a cell of CSV: escaped, and with ``csv_safe`` never a formula.

    >>> print(cell("=1+1"), cell("=1+1", csv_safe=True), cell("\t=1\n", csv_safe=True))
    =1+1 '=1+1 '\t=1\n
    """
    return ("'" if csv_safe and text.startswith(FORMULA) else "") + escaped(text)


def cells(column: Any, *, csv_safe: bool = False) -> Any:
    """Return a column of strings (Arrow) as `cell` returns each. Runs on workers, too."""
    import pyarrow as pa
    import pyarrow.compute as pc

    needs = f"[{COMMANDS}]" + ("|^[=+@-]" if csv_safe else "")
    if not pc.any(pc.match_substring_regex(column, needs)).as_py():
        return column
    words = column.to_pylist()
    return pa.array([None if w is None else cell(w, csv_safe=csv_safe) for w in words], pa.string())


class LogFormatter(logging.Formatter):
    """Each record is one line, but for an exception, whose lines are indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """Return the record's line."""
        return escaped(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Return the traceback, line by line."""
        return "\n".join(INDENT + escaped(line) for line in super().formatException(ei).split("\n"))
