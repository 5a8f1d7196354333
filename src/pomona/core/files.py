"""Files that are written whole or not at all, JSON, digests, the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pomona.core.errors import MismatchError, RequestError


def cache_folder() -> Path:
    """Return where downloaded weights are kept: ``POMONA_CACHE``, or the user's cache folder."""
    if folder := os.environ.get("POMONA_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    return Path(base).expanduser() / "pomona"


FORMAT = 1
"""Of OUT. Raise it when a reader of the old one would be wrong, and keep reading the old ones."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a file to write; it becomes ``path`` when it is whole. Runs on workers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(dest: Path, option: str) -> Iterator[Path]:
    """Give a folder to make and fill; it takes the place of ``dest`` when it is whole.

    Raises
    ------
    RequestError
        If it can't be written; names the command's ``option``.
    """
    staged = dest.with_name(f".{dest.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield staged
        if dest.exists():
            shutil.rmtree(dest)
        staged.rename(dest)
    except OSError as error:
        raise RequestError(f"{option} {dest} can't be written: {error.strerror}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """Write sorted JSON; a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read JSON that Pomona wrote; an empty dict where there is none.

    Raises
    ------
    MismatchError
        If it isn't JSON, or of a newer format.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise MismatchError(f"{path} is damaged: remove it, or choose another --out") from error
    if value.get("format", FORMAT) > FORMAT:
        raise MismatchError(f"{path} has format {value['format']}, made by a newer Pomona: update")
    return dict(value)


def sha256(path: Path) -> str:
    """Return a file's sha256."""
    with path.open("rb") as file:
        sha = hashlib.sha256()
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def tree_digest(files: dict[str, str]) -> str:
    """Return one digest for many files, given each one's by name."""
    lines = "".join(f"{name}\0{files[name]}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()
