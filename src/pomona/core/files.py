"""Atomic files and folders, JSON, digests, the cache folder."""

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
    """Return the cache folder: ``POMONA_CACHE``, or ``pomona`` in the user's cache folder."""
    if folder := os.environ.get("POMONA_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    return Path(base).expanduser() / "pomona"


FORMAT = 1
"""Version of OUT's files: raise it if an older Pomona would misread them; keep reading old ones."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file; it becomes ``path`` if the block ends well. Runs on workers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(dest: Path, option: str) -> Iterator[Path]:
    """Yield a name for a folder to make and fill; it replaces ``dest`` if the block ends well.

    Raises RequestError if it can't be written; the message names the command's ``option``.
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
    """Write JSON with sorted keys; a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, atomically."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read JSON that Pomona wrote; an empty dict where there is none.

    Raises MismatchError if it isn't JSON, or its format is newer than `FORMAT`.
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
    """Return a file's sha256, hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def tree_digest(files: dict[str, str]) -> str:
    """Return one sha256 for many files, from the digest of each by its name."""
    lines = "".join(f"{name}\0{files[name]}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()
