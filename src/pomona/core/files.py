"""Atomic files and folders, JSON, digests, the cache folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pomona.core.errors import DamagedError, MismatchError, RequestError

try:
    import fcntl
except ImportError:  # Windows
    FULL_SYNC = None
else:
    FULL_SYNC = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync leaves bytes in the disk's cache


def cache_folder() -> Path:
    """Return the cache folder: ``POMONA_CACHE``, or ``pomona`` in the user's cache folder."""
    if folder := os.environ.get("POMONA_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    return Path(base).expanduser() / "pomona"


FORMAT = 1
"""Version of OUT's files: raise it if an older Pomona would misread them; keep reading old ones."""


UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.part")
"""The name of a file that `atomic_file` was writing when the process was killed."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file; it becomes ``path`` if the block ends well. Runs on workers.

    A power cut leaves the old file or the new one, and once the block has ended, the new one.
    """
    make_folder(path.parent)
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield part
        put_in_place(part, path)
    finally:
        part.unlink(missing_ok=True)


def put_in_place(part: Path, path: Path) -> None:
    """Rename a finished file of the same folder such that a power cut can't lose it afterwards."""
    sync_file(part)  # before the rename, which may reach the disk earlier than the bytes
    part.replace(path)
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, that a power cut can't lose."""
    new = [path, *path.parents]
    new = new[: next(n for n, folder in enumerate(new) if folder.exists())]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(new):
        sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Return when a file's bytes are on the disk."""
    with path.open("rb+") as file:
        if FULL_SYNC is not None:
            fcntl.fcntl(file.fileno(), FULL_SYNC)
        else:
            os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Return when the names in a folder are on the disk; Windows has no call for that."""
    if os.name == "nt":
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network and user file systems
            raise
    finally:
        os.close(folder)


def sync_tree(root: Path) -> None:
    """Return when a folder with all that is below it is on the disk, except its own name."""
    for folder, _, names in os.walk(root):
        for name in names:
            sync_file(Path(folder, name))
        sync_folder(Path(folder))


@contextlib.contextmanager
def atomic_folder(dest: Path, option: str) -> Iterator[Path]:
    """Yield a name for a folder to make and fill; it replaces ``dest`` if the block ends well.

    Raises RequestError if it can't be written; the message names the command's ``option``.
    """
    dest = Path(os.path.realpath(dest))  # where it is a link, what it leads to is replaced
    staged = dest.with_name(f".{dest.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield staged
        make_folder(dest.parent)
        sync_tree(staged)
        if dest.exists():
            shutil.rmtree(dest)
        staged.rename(dest)
        sync_folder(dest.parent)
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


def read_json(path: Path, remedy: str = "remove it, or choose another --out") -> dict[str, Any]:
    """Read a JSON object that Pomona wrote; an empty dict where there is no file.

    Raises DamagedError with the ``remedy`` if it is something else, MismatchError if its format is
    newer than `FORMAT`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:  # no JSON, or no UTF-8
        value = None
    if not isinstance(value, dict):
        raise DamagedError(f"{path} is damaged: {remedy}")
    if value.get("format", FORMAT) > FORMAT:
        raise MismatchError(f"{path} has format {value['format']}, made by a newer Pomona: update")
    return value


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
