"""List the photos of a folder or an object store."""

from __future__ import annotations

import functools
import os
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from pomona.core.errors import SourceError, first_line
from pomona.core.object_store import READ_AHEAD, connect, retrying
from pomona.core.schema import FILES
from pomona.photos.source import Source, is_photo

OnCount = Callable[[int], None]


@dataclass
class Listing:
    """The files of a source.

    The photos include what can't be read, such as a dangling link, or a folder that is named like
    a photo and holds none.
    """

    files: pa.Table  # the photos, as `pomona.core.schema.FILES`, in no order
    others: Counter[str] = field(default_factory=Counter)  # files that aren't photos, by suffix


def list_files(source: Source, on_count: OnCount | None = None) -> Listing:
    """List the photos of a local source or an object store. Runs on the driver.

    A few threads list folders, and each folder's photos become Arrow columns at once, so that a
    photo costs its path and 16 bytes of memory. Hidden names (``.x``) are skipped. Raises
    SourceError if the source can't be listed.
    """
    scan = _scan_local if source.kind == "local" else functools.partial(_scan_store, source)
    tables: list[pa.Table] = []
    others: Counter[str] = Counter()
    count = 0
    with ThreadPoolExecutor(2 if source.kind == "local" else READ_AHEAD) as pool:
        try:
            waiting = deque([pool.submit(scan, source.root)])
            while waiting:
                folders, table, rest = waiting.popleft().result()
                waiting.extend(pool.submit(scan, folder) for folder in folders)
                others += rest
                if table.num_rows:
                    tables.append(table)
                    count += table.num_rows
                    if on_count:
                        on_count(count)
        except OSError as error:
            pool.shutdown(cancel_futures=True)
            raise SourceError(f"{source.name} can't be listed: {first_line(error)}") from error
    files = pa.concat_tables(tables) if tables else FILES.empty_table()
    return Listing(_relative(files, source.root), others)


Scan = tuple[list[str], pa.Table, "Counter[str]"]


def _scan_local(folder: str) -> Scan:
    """Return the folders in a folder, its photos, and the number of other files by suffix."""
    folders: list[str] = []
    rows: list[tuple[str, int, int]] = []
    others: Counter[str] = Counter()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                if not _loops(entry):
                    folders.append(entry.path)
                if is_photo(entry.name) and not _holds_photos(entry.path):
                    rows.append((entry.path, 0, 0))
            elif not is_photo(entry.name):
                others[PurePosixPath(entry.name).suffix.lower()] += 1
            else:
                rows.append((entry.path, *_stat(entry)))
    return folders, _file_table(rows), others


def _stat(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        stat = entry.stat()
    except OSError:  # a dangling link, or removed meanwhile: it is listed as an unreadable photo
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself or into a forbidden folder: listed as an unreadable photo
        return False


def _loops(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a link to a folder that contains it, so that a walk wouldn't end."""
    if not entry.is_symlink():
        return False
    target = Path(os.path.realpath(entry.path))
    parents = (Path(os.path.realpath(parent)) for parent in Path(entry.path).parents)
    return any(parent.is_relative_to(target) for parent in parents)


def _holds_photos(folder: str) -> bool:
    return any(is_photo(name) for _, _, names in os.walk(folder) for name in names)


def _scan_store(source: Source, folder: str) -> Scan:
    from pyarrow.fs import FileSelector, FileType

    rows: list[tuple[str, int, int]] = []
    folders: list[str] = []
    others: Counter[str] = Counter()
    filesystem = connect(source.store)
    for info in retrying(lambda: filesystem.get_file_info(FileSelector(folder))):
        if info.base_name.startswith("."):
            continue
        if info.type == FileType.Directory:
            folders.append(info.path)
        elif is_photo(info.base_name):
            rows.append((info.path, info.size or 0, info.mtime_ns or 0))
        else:
            others[PurePosixPath(info.base_name).suffix.lower()] += 1
    return folders, _file_table(rows), others


def _file_table(rows: list[tuple[str, int, int]]) -> pa.Table:
    # A name that isn't UTF-8 is escaped, as Arrow's strings are UTF-8; so it can't be read.
    paths = [os.fsencode(path).decode("utf-8", "backslashreplace") for path, _, _ in rows]
    sizes, times = [row[1] for row in rows], [row[2] for row in rows]
    modified = pa.array([ns // 1_000_000 * 1000 for ns in times], pa.int64())
    columns = [pa.array(paths, pa.string()), pa.array(sizes, pa.int64())]
    return pa.table([*columns, modified.cast(FILES.field("modified").type)], schema=FILES)


def _relative(files: pa.Table, root: str) -> pa.Table:
    start = len(root.rstrip("/")) + 1  # in code points, as utf8_slice_codeunits counts
    paths = pc.utf8_slice_codeunits(files["path"], start)
    if os.sep != "/":
        paths = pc.replace_substring(paths, os.sep, "/")
    return files.set_column(0, FILES.field("path"), paths)
