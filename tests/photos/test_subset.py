"""Smaller copies of a source."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pomona.core.errors import RequestError
from pomona.photos.listing import list_files
from pomona.photos.source import open_source
from pomona.photos.subset import subset
from tests.conftest import photo


def test_a_disk_where_case_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two photos whose paths differ in case alone isn't written over the first."""
    for label in ("Apple", "apple"):
        (tmp_path / "source" / "Training" / label).mkdir(parents=True)
        (tmp_path / "source" / "Training" / label / "1.jpg").write_bytes(photo())
    source = open_source(tmp_path / "source")
    true_exists = Path.exists

    def exists(path: Path) -> bool:
        if not true_exists(path.parent) or "dest" not in path.parts:
            return true_exists(path)
        folded = str(path).casefold()
        there = (Path(folder, name) for folder, _, names in os.walk(tmp_path) for name in names)
        return any(str(other).casefold() == folded for other in there)

    monkeypatch.setattr(Path, "exists", exists)
    with pytest.raises(RequestError, match="names that differ in case alone are one"):
        subset(source, list_files(source), tmp_path / "dest", 100, copy=True)
