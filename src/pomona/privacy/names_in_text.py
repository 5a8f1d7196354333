"""Find photos' names in text, as they are or as JSON, HTML, CSV and URIs write them."""

from __future__ import annotations

import html
import json
import mmap
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pomona.core.printable import INDENT, cell, escaped
from pomona.photos.source import SUFFIXES

GONE = "(forgotten)"  # replaces a name
MANY = 200
"""Searching a report of 1 MB for more names than this takes seconds."""

_SUFFIX = "|".join(re.escape(suffix) for suffix in SUFFIXES)
ANY_PHOTO = re.compile(rf".*(?:{_SUFFIX}).*", re.IGNORECASE | re.DOTALL)
"""Matches text that names any photo, by its suffix."""
_SUFFIX_ANYWHERE = f"(?i:{_SUFFIX})"
_BREAK = re.compile(r"[\r\n]")
A_PHOTO = re.compile(_SUFFIX.encode(), re.IGNORECASE)
"""Finds the name of any photo in bytes."""


class Names:
    """Find and replace some names in text.

    With more than `MANY` names any photo's name counts as one of them, because a regular expression
    of so many alternatives is slow: too much is removed then, never too little. ``others`` are file
    names that no other photo has, and other words to find.
    """

    def __init__(self, paths: Iterable[str], others: Iterable[str] = ()) -> None:
        self.paths = frozenset(paths)
        names = [*self.paths, *others]
        if len(names) > MANY:  # any photo's suffix; what stands before a line break, by its name
            pattern = "|".join(
                [_SUFFIX_ANYWHERE, *_alternatives(n for n in names if _BREAK.search(n))]
            )
            self._text, self._bytes = ANY_PHOTO, re.compile(pattern.encode())
            return
        pattern = "|".join(_alternatives(names))
        self._text = re.compile(pattern or r"(?!)")
        self._bytes = re.compile(pattern.encode("utf-8", "surrogateescape") or rb"(?!)")

    def are_in(self, content: bytes) -> bool:
        """Tell whether bytes hold one of the names."""
        return self._bytes.search(content) is not None

    def spans(self, content: bytes) -> Iterator[tuple[int, int]]:
        """Give where the names stand in bytes: start and end."""
        return (found.span() for found in self._bytes.finditer(content))

    def are_in_file(self, path: Path) -> bool:
        """Tell whether a file holds one of the names, without reading it into memory."""
        if not path.stat().st_size:
            return False
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            return self._bytes.search(whole) is not None

    def replaced(self, text: str) -> str:
        """Return the text with `GONE` in the place of each name."""
        return self._text.sub(GONE, text)

    def pruned(self, value: Any) -> Any:
        """Return a JSON value without the items of lists that hold a name."""
        if isinstance(value, dict):
            return {self.replaced(key): self.pruned(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.pruned(item) for item in value if not self._in_item(item)]
        return self.replaced(value) if isinstance(value, str) else value

    def _in_item(self, item: Any) -> bool:
        values = item.values() if isinstance(item, dict) else [item]
        return any(isinstance(value, str) and self._text.search(value) for value in values)


def _alternatives(names: Iterable[str]) -> list[str]:
    """Return patterns that match the names in all their forms, the longest first."""
    written = {form for name in names if name for form in forms(name)}
    return [_pattern(form) for form in sorted(written, key=len, reverse=True)]


def _pattern(form: str) -> str:
    # 1.jpg isn't 21.jpg. Any other character may stand in front: finding too much is safe.
    return (r"(?<![0-9])" if form[0].isdigit() else "") + re.escape(form)


def forms(name: str) -> set[str]:
    r"""Return the ways to write a name.

    >>> sorted(forms("a&b.jpg"))
    ['a%26b.jpg', 'a&amp;b.jpg', 'a&b.jpg', 'a\\u0026b.jpg']
    """
    ascii_json, in_html = json.dumps(name)[1:-1], html.escape(name)
    in_script = "".join(f"\\u{ord(c):04x}" if c in "<>&'" else c for c in ascii_json)
    return {
        name,
        ascii_json,
        in_script,
        json.dumps(name, ensure_ascii=False)[1:-1],
        in_html,
        in_html.replace("&#x27;", "&#39;").replace("&quot;", "&#34;"),
        quote(name),
        name.replace('"', '""'),
        repr(name)[1:-1],
        escaped(name),
        f"\n{INDENT}".join(map(escaped, name.split("\n"))),  # in an exception in the log
    }


def cell_forms(name: str) -> set[str]:
    """Return the ways that a name is written in a column of CSV, once it is read."""
    return {name, *(cell(name, csv_safe=safe) for safe in (False, True))}
