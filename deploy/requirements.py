"""Print what the installed Pomona needs beside PySpark: ``python requirements.py [EXTRA ...]``.

A cluster has PySpark in the version that it runs; a second one from the package index would be
400 MB that must never be imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import requires

# pip reads the list, so its parser is there even if nothing else is installed yet.
from pip._vendor.packaging.requirements import Requirement


def wanted(extras: Sequence[str]) -> Iterator[str]:
    """Give the requirements of the core, of `spark` and of other extras, in pip's format."""
    for line in requires("pomona") or []:
        requirement = Requirement(line)
        marker, of = requirement.marker, ("", "spark", *extras)
        if requirement.name == "pyspark":
            continue
        if marker is None or any(
            marker.evaluate({"extra": extra}) for extra in ("", "spark", *extras)
        ):
            yield f"{requirement.name}{requirement.specifier}"


if __name__ == "__main__":
    print("\n".join(wanted(sys.argv[1:])))
