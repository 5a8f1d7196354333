"""Places for copies of OUT, on an object store or in a folder: list, read, write, remove files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomona.core.errors import RequestError, first_line
from pomona.core.files import atomic_file
from pomona.core.object_store import connect, retrying
from pomona.core.uris import is_store, local_path, refuse_uri
from pomona.photos.source import open_source

log = logging.getLogger("pomona")

SMALL = 16 << 20
"""Bytes up to which a file is read into memory, and written with one request."""

CHUNK = 8 << 20
"""Bytes that are copied at a time."""

Entry = dict[str, Any]
"""``size`` and ``sha256`` of a file."""


@dataclass(frozen=True)
class Place:
    """A folder on an object store, or a plain one."""

    name: str  # its URI without options, or its path
    root: str  # bucket/prefix, or the absolute path
    store: str = ""  # the store's URI with options; empty for a plain folder

    @property
    def _files(self) -> Any:
        from pyarrow.fs import LocalFileSystem

        return connect(self.store, writes=True) if self.store else LocalFileSystem()

    def __str__(self) -> str:
        return self.name

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each file by its name."""
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self.root, recursive=True, allow_not_found=True)
        infos = retrying(lambda: self._files.get_file_info(selector))
        start = len(self.root) + 1
        return {info.path[start:]: info.size for info in infos if info.type == FileType.File}

    def read_json(self, name: str) -> dict[str, Any]:
        """Return a JSON object; an empty dict if there is no such file, or it is damaged."""
        try:
            return dict(json.loads(self.read_bytes(name)))
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError):
            log.warning("%s of %s is damaged", name, self)
            return {}

    def read_bytes(self, name: str) -> bytes:
        """Return a file's bytes. Raises OSError."""

        def read() -> bytes:
            with self._files.open_input_file(f"{self.root}/{name}") as file:
                return bytes(file.read())

        return retrying(read)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a small file, atomically."""

        def write() -> None:
            with self._writing(name) as file:
                file.write(content)

        retrying(write)

    def write_json(self, name: str, value: object) -> None:
        """Write JSON, atomically."""
        self.write_bytes(name, json.dumps(value, sort_keys=True, ensure_ascii=False).encode())

    def upload(self, path: Path, name: str) -> Entry:
        """Copy a file to the place. Returns size and sha256 of what was sent."""
        if path.stat().st_size <= SMALL:
            content = path.read_bytes()
            self.write_bytes(name, content)
            return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

        def send() -> Entry:
            with path.open("rb") as source, self._writing(name) as file:
                return _copy(source, file)

        return retrying(send)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[Any]:
        if not self.store:
            with atomic_file(Path(self.root, name)) as part, part.open("wb") as file:
                yield file
            return
        with self._files.open_output_stream(f"{self.root}/{name}") as file:
            yield file

    def download(self, name: str, path: Path) -> Entry:
        """Copy a file from the place. Returns size and sha256 of what came."""

        def fetch() -> Entry:
            with (
                atomic_file(path) as part,
                part.open("wb") as file,
                self._files.open_input_stream(f"{self.root}/{name}") as source,
            ):
                return _copy(source, file)

        return retrying(fetch)

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            retrying(lambda: self._files.delete_file(f"{self.root}/{name}"))
        if not self.store:
            drop_empty(Path(self.root), name)


def drop_empty(root: Path, name: str) -> None:
    """Remove the empty folders above a removed file: their names may be personal data, too."""
    for folder in (root / name).parents:
        if folder == root:
            return
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:  # it isn't empty
            return


def _copy(source: Any, target: Any) -> Entry:
    sha, size = hashlib.sha256(), 0
    while chunk := source.read(CHUNK):
        target.write(chunk)
        sha.update(chunk)
        size += len(chunk)
    return {"size": size, "sha256": sha.hexdigest()}


def open_place(text: str) -> Place:
    """Return the place of a URI or a folder's path. Doesn't touch the network.

    Raises RequestError if it is a URI of another kind than Arrow's object stores.
    """
    if not is_store(text):
        refuse_uri(text, "a place for OUT")
        path = local_path(text)
        return Place(str(path), str(path))
    source = open_source(text)  # it parses the URI
    return Place(source.name, source.root, source.store)


@contextlib.contextmanager
def refusing(place: Place, what: str) -> Iterator[None]:
    """Raise an OSError of the block as a RequestError: the place can't be ``what``."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{place} can't be {what}: {first_line(error)}") from error
