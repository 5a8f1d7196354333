"""Where photos lie: list them, give them their meaning, read their bytes.

A source is a local folder, ``file://``, an object store that Arrow speaks (``s3://``, ``gs://``),
or a URI that only Hadoop knows (``hdfs://``, ``dbfs:``, ``abfss://``); `pomona.frames` lists and
reads the last kind.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import random
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from pomona.errors import RequestError, SourceError
from pomona.manifest import local_path, shown
from pomona.schema import FILES, PHOTOS, SPLITS

log = logging.getLogger("pomona")

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_BYTES = 128 << 20
"""A photo's file: eight of these still fit into one Arrow batch."""

READ_AHEAD = 16
"""Reads in flight in a worker on an object store: latency is what costs (benchmarks/reading.py)."""

TRIES = 4
"""How often a call to an object store is made, each with `S3_ATTEMPTS` requests beneath it."""

PATIENCE = 45.0
"""Seconds after which a call that failed isn't made again."""

S3_ATTEMPTS = 3
"""Requests that the S3 client makes by itself, with pauses that grow: a page of a long listing that
fails must not start the listing again."""

REQUEST_TIMEOUT, CONNECT_TIMEOUT = 5.0, 3.0
"""Seconds without a byte, and without a connection, after which a request is given up."""

GS_SECONDS = 10
"""How long the client of Google's store tries by itself; its own default is 15 minutes."""


def folder_of(path: str) -> str:
    """Return the folder that holds a photo, which is its group; itself where it is in none."""
    return path.rpartition("/")[0] or path


T = TypeVar("T")
SCHEME = r"([a-zA-Z][a-zA-Z0-9+.-]+):"
"""Of a URI; a single letter is a drive."""

Reader = Callable[[str], bytes]
OnCount = Callable[[int], None]


@dataclass(frozen=True)
class Source:
    """A place that holds photos. Picklable: it crosses to the workers.

    Attributes
    ----------
    uri
        As the user gave it.
    kind
        ``local`` is read with file calls, ``object`` with ``pyarrow.fs``, ``hadoop`` by Spark.
    root
        The folder: an absolute local path, ``bucket/prefix``, or the URI itself.
    """

    uri: str
    kind: Literal["local", "object", "hadoop"]
    root: str
    store: str = ""

    @property
    def folder(self) -> str:
        """The last part of its name."""
        return re.split(r"[/\\:]", self.root.rstrip("/\\"))[-1] or "photos"

    @property
    def name(self) -> str:
        """What identifies the source: its URI without options (they may hold credentials)."""
        scheme = urlsplit(self.uri).scheme
        if self.kind == "object":
            return f"{scheme}://{self.root}"
        password = r"^([^:/]+://)[^/@]*:[^/@]*@"  # a name before @ alone may be a container's
        return re.sub(password, r"\1", self.root) if self.kind == "hadoop" else self.root


@dataclass
class Listing:
    """What a source holds.

    Attributes
    ----------
    files
        The photos, as `pomona.schema.FILES`, in no order; among them what can't be read, such as a
        dangling link, or a folder that is named like a photo and holds none.
    others
        How many files are not photos, by suffix.
    """

    files: pa.Table
    others: Counter[str] = field(default_factory=Counter)


def open_source(uri: str | Path) -> Source:
    """Tell what kind of source a path or URI is. Doesn't touch the network.

    Raises
    ------
    SourceError
        If it is a local path that doesn't exist or isn't a folder.
    """
    text = str(uri)
    scheme = re.match(SCHEME, text)
    if scheme is None or scheme[1].lower() == "file" or Path(text).is_dir():
        return _open_local(text)
    if scheme[1].lower() in ("s3", "gs", "gcs"):
        # Keys may hold any character, so only a trailing ?option=value&… is taken as options.
        options = re.search(r"\?((?:[a-z_]+=[^&?/]*(?:/[^&?]*)?&?)+)$", text)
        location = text[: options.start()] if options else text
        rest = location.split("://", 1)[-1].strip("/")
        rest = re.sub(r"^[^/@]*@", "", rest)  # Arrow takes them from there; no table may hold them
        if not rest:
            raise SourceError(f"{shown(text)} names no bucket: write {scheme[1]}://BUCKET/FOLDER")
        bucket = location.split("://", 1)[-1].strip("/").split("/", 1)[0]
        if ":" in bucket and "@" not in bucket:
            raise SourceError(f"{shown(text)} has a / in its secret: write %2F there")
        store = f"{scheme[1].lower()}://{bucket}" + (options[0] if options else "")
        return Source(text, "object", rest, store)
    return Source(text, "hadoop", text.rstrip("/"))


def _open_local(text: str) -> Source:
    path = local_path(text)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise SourceError(f"{text} {what}: a source is a folder of photos or its URI")
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError("the source's own name is not UTF-8: rename that folder") from error
    return Source(text, "local", os.fspath(path))


def is_photo(name: str) -> bool:
    """Whether a file's name says that it is a photo (any case)."""
    return name.lower().endswith(SUFFIXES)


# --- listing -----------------------------------------------------------------------------------


def list_files(source: Source, on_count: OnCount | None = None) -> Listing:
    """List the photos of a local source or an object store. Runs on the driver.

    Folders are listed by a few threads at once, and each goes to Arrow columns as it comes, so that
    the cost per photo is its path and 16 bytes. Hidden names (``.x``) are passed over.

    Raises
    ------
    SourceError
        If the source can't be listed.
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
    """One folder: the folders in it, its photos, and a count of the rest."""
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
    except OSError:  # a dangling link, or gone since: it is listed, and will be unreadable
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder without permission: an unreadable photo
        return False


def _loops(entry: os.DirEntry[str]) -> bool:
    """Whether a link leads to a folder that was gone through on the way to it."""
    if not entry.is_symlink():
        return False
    target = Path(os.path.realpath(entry.path))
    on_the_way = (Path(os.path.realpath(parent)) for parent in Path(entry.path).parents)
    return any(folder.is_relative_to(target) for folder in on_the_way)


def _holds_photos(folder: str) -> bool:
    return any(is_photo(name) for _, _, names in os.walk(folder) for name in names)


def _scan_store(source: Source, folder: str) -> Scan:
    from pyarrow.fs import FileSelector, FileType

    rows: list[tuple[str, int, int]] = []
    folders: list[str] = []
    others: Counter[str] = Counter()
    filesystem = connect(source.store)
    for info in patiently(lambda: filesystem.get_file_info(FileSelector(folder))):
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
    # A name that isn't UTF-8 can't stand in a table: it is shown escaped, and can't be read.
    paths = [os.fsencode(path).decode("utf-8", "backslashreplace") for path, _, _ in rows]
    sizes, times = [row[1] for row in rows], [row[2] for row in rows]
    modified = pa.array([ns // 1_000_000 * 1000 for ns in times], pa.int64())
    columns = [pa.array(paths, pa.string()), pa.array(sizes, pa.int64())]
    return pa.table([*columns, modified.cast(FILES.field("modified").type)], schema=FILES)


def _relative(files: pa.Table, root: str) -> pa.Table:
    start = len(root.rstrip("/")) + 1  # code points: utf8_slice counts those too
    paths = pc.utf8_slice_codeunits(files["path"], start)
    if os.sep != "/":
        paths = pc.replace_substring(paths, os.sep, "/")
    return files.set_column(0, FILES.field("path"), paths)


# --- meaning -----------------------------------------------------------------------------------


def arrange(
    files: pa.Table,
    label: str = "parent",
    test_fraction: float | None = None,
    *,
    root: str = "photos",
) -> pa.Table:
    """Give each photo its split, label and filename, and an order.

    Parameters
    ----------
    files
        As `pomona.schema.FILES`.
    label
        ``parent``: the folder that holds the photo. ``top``: the first folder under the split; for
        a photo that lies in none, the folder that holds it.
    test_fraction
        Share of the photos (with ``top``: of the folders that hold them, since neighbouring photos
        of one folder are near-copies) that goes to ``Test``, by a hash of the path, so that a
        photo stays in its split when others come.
    root
        The source's own name: the label of photos that lie in no folder below it.

    Returns
    -------
    pa.Table
        As `pomona.schema.PHOTOS`, sorted by split and path. In a source that has a ``Training`` or
        ``Test`` folder, photos that lie elsewhere are left out.

    Raises
    ------
    RequestError
        If ``label`` is another word; if ``test_fraction`` is given for a source that is split
        already, or isn't between 0 and 1.
    """
    if label not in ("parent", "top"):
        raise RequestError(f"--label is parent or top, not {label}")
    paths = files["path"]
    has_splits = bool(pc.any(pc.match_substring_regex(paths, r"^(Training|Test)/")).as_py())
    if has_splits:
        files = files.filter(pc.match_substring_regex(paths, r"^(Training|Test)/"))
        paths = files["path"]
        splits = pc.replace_substring_regex(paths, r"(?s)/.*$", "")
        inner = pc.replace_substring_regex(paths, r"^[^/]*/", "")
    else:
        splits = pa.chunked_array([pa.repeat("Training", len(paths))])
        inner = paths
    filenames = pc.replace_substring_regex(paths, r"(?s)^.*/", "")
    in_folder = pc.match_substring(inner, "/")
    folders = pc.replace_substring_regex(inner, r"(?s)/[^/]*$", "")
    labels = pc.replace_substring_regex(folders, r"(?s)/.*$" if label == "top" else r"(?s)^.*/", "")
    labels = pc.if_else(in_folder, labels, splits if has_splits else pa.scalar(root))
    if test_fraction is not None:
        splits = _draw(folders if label == "top" else paths, test_fraction, has_splits)
    table = pa.table(
        [paths, splits, labels, filenames, files["size"], files["modified"]], schema=PHOTOS
    )
    return table.sort_by([("split", "ascending"), ("path", "ascending")])


def _draw(keys: pa.ChunkedArray, fraction: float, has_splits: bool) -> pa.ChunkedArray:
    if has_splits:
        raise RequestError(
            "--test-fraction is for a source without Training and Test folders, and this one has "
            "them: leave the option out"
        )
    if not 0 < fraction < 1:
        raise RequestError(f"--test-fraction is a share between 0 and 1, not {fraction:g}")
    draws = (
        int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
        for key in keys.to_pylist()
    )
    names = ["Test" if draw < fraction else "Training" for draw in draws]
    return pa.chunked_array([pa.array(names, pa.string())])


def layout_hint(files: pa.Table) -> str:
    """Return a sentence when Training and Test lie one folder deeper, else nothing."""
    heads = {
        "/".join(path.split("/")[:2])
        for path in files["path"].slice(0, 100_000).to_pylist()
        if path.count("/") >= 2
    }
    inner = sorted({head.split("/")[0] for head in heads if head.split("/")[-1] in SPLITS})
    if not inner or inner[0] in SPLITS:
        return ""
    return f"Training and Test folders lie in {inner[0]}/: is that the source you mean?"


# --- reading -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def connect(store: str, *, writes: bool = False) -> Any:
    """Return the Arrow file system of an object store's URI. Runs on workers, too.

    With ``writes`` a small file is one request, and a missing bucket shows when it is written.

    Raises
    ------
    SourceError
        If the URI has an option that Arrow doesn't know.
    OSError
        If the bucket's region is asked for, and no answer comes.
    """
    try:
        return _connect_s3(store, writes) if store.startswith("s3") else _connect_gs(store)
    except (pa.ArrowInvalid, ValueError, TypeError) as error:
        reason = first_line(error).replace(store, shown(store))
        raise SourceError(f"{shown(store)}: {reason}") from error


def _connect_gs(store: str) -> Any:
    from pyarrow.fs import FileSystem

    if "retry_limit_seconds=" not in store:
        store += f"{'&' if '?' in store else '?'}retry_limit_seconds={GS_SECONDS}"
    return FileSystem.from_uri(store)[0]


def _connect_s3(store: str, writes: bool) -> Any:
    from pyarrow.fs import AwsStandardS3RetryStrategy, FileSystem, S3FileSystem

    # What Arrow makes of a URI tries 31 times, every 0.2 s, whatever is the matter, and no option
    # changes that: a throttled store is held down, and a request that hangs takes 99 s.
    found = FileSystem.from_uri(store)[0]  # it checks the options, and finds the bucket's region
    user, _, secret = urlsplit(store).netloc.rpartition("@")[0].partition(":")
    defaults = {
        "access_key": user or None,
        "secret_key": secret or None,
        "region": found.region,
        "endpoint_override": next(
            (os.environ[n] for n in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if n in os.environ),
            None,
        ),
        "request_timeout": REQUEST_TIMEOUT,
        "connect_timeout": CONNECT_TIMEOUT,
        "allow_delayed_open": writes,
    }
    words = {"true": True, "false": False}
    asked = {k: words.get(v, v) for k, v in parse_qsl(store.partition("?")[2])}
    strategy = AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS)
    return S3FileSystem(**{**defaults, **asked}, retry_strategy=strategy)


_LASTING = re.compile(
    # What S3's answers are called, and the numbers of those that have no name: a HEAD has no body.
    r"AWS Error (?:\w*ACCESS_DENIED|\w*NO_SUCH_|\w*NOT_FOUND|INVALID_|MISSING_|MALFORMED_|"
    r"SIGNATURE_|INCOMPLETE_|UNRECOGNIZED_|OPT_IN_|OBJECT_NOT_IN|REQUEST_EXPIRED|VALIDATION)|"
    r"HTTP status (?:3\d\d|4(?!08|29)\d\d)|"
    r"PERMISSION_DENIED|UNAUTHENTICATED|FAILED_PRECONDITION|INVALID_ARGUMENT"  # Google's
)
_LASTING_TYPES = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)


def may_pass(error: OSError) -> bool:
    """Tell whether an object store may answer better later: throttled, broken, too slow.

    >>> may_pass(OSError("AWS Error SLOW_DOWN during GetObject operation"))
    True
    >>> may_pass(OSError("AWS Error ACCESS_DENIED during GetObject operation"))
    False
    """
    return not isinstance(error, _LASTING_TYPES) and not _LASTING.search(str(error))


def patiently(call: Callable[[], T]) -> T:
    """Call, and call again if what failed may pass. Runs on workers, too.

    The pauses are drawn between 0 and 1, 2 and 4 seconds, so that workers that failed together
    don't come back together.

    Raises
    ------
    OSError
        What the last call raised: at once if it can't pass, else after `TRIES` or `PATIENCE`.
    """
    end = time.monotonic() + PATIENCE
    for number in range(TRIES):
        try:
            return call()
        except OSError as error:
            if number == TRIES - 1 or not may_pass(error) or time.monotonic() > end:
                raise
            log.info("trying again: %s", first_line(error))
            time.sleep(random.uniform(0, 2**number))
    raise AssertionError("the last try returns or raises")


def reader(source: Source) -> Reader:
    """Return a function from relative path to bytes; it raises OSError. Runs on workers.

    Of a file above `MAX_BYTES` only so much and one byte more is read, which tells that it is one.
    """

    def read_local(path: str) -> bytes:
        with Path(source.root, path).open("rb") as file:
            return file.read(MAX_BYTES + 1)

    def read_object(path: str) -> bytes:
        return patiently(lambda: _read_object(source, path))

    return read_local if source.kind == "local" else read_object


def _read_object(source: Source, path: str) -> bytes:
    with connect(source.store).open_input_file(f"{source.root}/{path}") as file:
        return bytes(file.read(MAX_BYTES + 1))


def read_uri(text: str) -> bytes:
    """Read a photo by its path or URI (local, ``file:``, ``s3://``, ``gs://``). Runs on workers.

    Raises
    ------
    OSError
        If it can't be read, or only Hadoop knows such URIs.
    """
    try:
        scheme = re.match(SCHEME, text)
        if scheme is None or scheme[1].lower() == "file" or Path(text).is_file():
            path = local_path(text)
            return reader(Source(text, "local", os.fspath(path.parent)))(path.name)
        source = open_source(text)
        if source.kind == "hadoop":
            raise OSError("only Hadoop reads this URI: read it with binaryFile, and give the bytes")
        folder, _, name = source.root.rpartition("/")
        return reader(replace(source, root=folder))(name)
    except (SourceError, ValueError) as error:
        raise OSError(first_line(error)) from error


def read(photos: Iterator[pa.RecordBatch], source: Source) -> Iterator[pa.RecordBatch]:
    """Add the column ``content``: the file's bytes, or null if they can't be read. Runs on workers.

    On an object store the next `READ_AHEAD` files are on their way while these are in use.
    """
    return _read(photos, reader(source), ahead=source.kind != "local")


def read_uris(photos: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Do as `read` where each ``path`` is a whole path or URI, or null. Runs on workers."""
    return _read(photos, read_uri, ahead=True)


def _read(
    photos: Iterator[pa.RecordBatch], read_one: Reader, ahead: bool
) -> Iterator[pa.RecordBatch]:
    def content(path: str | None) -> bytes | None:
        try:
            return None if path is None else read_one(path)
        except OSError as error:  # the table has the code, the log the reason
            log.warning("unreadable: %s: %s", path, first_line(error))
            return None

    if not ahead:
        for batch in photos:
            yield with_content(batch, [content(path) for path in batch["path"].to_pylist()])
        return
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        under_way: deque[tuple[pa.RecordBatch, list[Any]]] = deque()
        for batch in photos:
            under_way.append((batch, [pool.submit(content, p) for p in batch["path"].to_pylist()]))
            while sum(len(futures) for _, futures in under_way) > READ_AHEAD + batch.num_rows:
                first, futures = under_way.popleft()
                yield with_content(first, [future.result() for future in futures])
        for first, futures in under_way:
            yield with_content(first, [future.result() for future in futures])


def with_content(batch: pa.RecordBatch, contents: list[bytes | None]) -> pa.RecordBatch:
    """Append the column ``content`` to a batch of photos."""
    return pa.RecordBatch.from_arrays(
        [*batch.columns, pa.array(contents, pa.binary())],
        schema=batch.schema.append(pa.field("content", pa.binary())),
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
