"""Sources of photos: what kind a path or URI is, and the split and label of each photo in it.

A source is a local folder, ``file://``, an object store that Arrow reads (``s3://``, ``gs://``), or
a URI that only Hadoop reads (``hdfs://``, ``dbfs:``, ``abfss://``); `pomona.spark.binary_files`
lists and reads the last kind.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from pomona.core.errors import RequestError, SourceError
from pomona.core.schema import PHOTOS, SPLITS
from pomona.core.uris import local_path, redacted

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

MAX_BYTES = 128 << 20
"""Largest size of a photo's file: eight of these still fit into one Arrow batch."""


def folder_of(path: str) -> str:
    """Return the folder that holds a photo, which is its group; without one, the path itself."""
    return path.rpartition("/")[0] or path


SCHEME = r"([a-zA-Z][a-zA-Z0-9+.-]+):"
"""The scheme of a URI; a single letter is a drive of Windows."""


@dataclass(frozen=True)
class Source:
    """A place that holds photos. Picklable, for workers.

    ``local`` is read as files, ``object`` with ``pyarrow.fs``, ``hadoop`` by Spark.
    """

    uri: str  # as the user gave it
    kind: Literal["local", "object", "hadoop"]
    root: str  # the folder: an absolute local path, bucket/prefix, or the URI itself
    store: str = ""  # the URI of an object store's bucket, with options and credentials

    @property
    def folder(self) -> str:
        """The name of the folder itself."""
        return re.split(r"[/\\:]", self.root.rstrip("/\\"))[-1] or "photos"

    @property
    def name(self) -> str:
        """The source's identity: its URI without options, which may hold credentials."""
        scheme = urlsplit(self.uri).scheme
        if self.kind == "object":
            return f"{scheme}://{self.root}"
        password = r"^([^:/]+://)[^/@]*:[^/@]*@"  # without ":", it may be a container of Azure's
        return re.sub(password, r"\1", self.root) if self.kind == "hadoop" else self.root


def open_source(uri: str | Path) -> Source:
    """Return the source of a path or URI. Doesn't touch the network.

    Raises SourceError if it is a local path that isn't a folder, or a URI without a bucket.
    """
    text = str(uri)
    scheme = re.match(SCHEME, text)
    if scheme is None or scheme[1].lower() == "file" or Path(text).is_dir():
        return _open_local(text)
    if scheme[1].lower() in ("s3", "gs", "gcs"):
        # An object's key may hold any character: only a trailing ?option=value&… counts as options.
        options = re.search(r"\?((?:[a-z_]+=[^&?/]*(?:/[^&?]*)?&?)+)$", text)
        location = text[: options.start()] if options else text
        rest = location.split("://", 1)[-1].strip("/")
        root = re.sub(r"^[^/@]*@", "", rest)  # less credentials, which Arrow takes from `store`
        if not root:
            example = f"{scheme[1]}://BUCKET/FOLDER"
            raise SourceError(f"{redacted(text)} names no bucket: write {example}")
        bucket = rest.split("/", 1)[0]
        if ":" in bucket and "@" not in bucket:
            raise SourceError(f"{redacted(text)} has a / in its secret: write %2F there")
        store = f"{scheme[1].lower()}://{bucket}" + (options[0] if options else "")
        return Source(text, "object", root, store)
    return Source(text, "hadoop", text.rstrip("/"))


def open_readable(uri: str | Path) -> Source:
    """Open a source whose photos this process reads itself: any but Hadoop's.

    Raises SourceError as `open_source`, or if only Spark reads the source.
    """
    source = open_source(uri)
    if source.kind == "hadoop":
        raise SourceError(
            f"{source.name} can be read by Spark alone: copy it to a local folder, s3:// or gs://"
        )
    return source


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


def arrange(
    files: pa.Table,
    label: str = "parent",
    test_fraction: float | None = None,
    *,
    root: str = "photos",
) -> pa.Table:
    """Give each photo of `FILES` its split, label and filename: `PHOTOS`, sorted by split and path.

    In a source that has a ``Training`` or ``Test`` folder, photos that lie elsewhere are left out.

    Parameters
    ----------
    label
        ``parent``: the folder that holds the photo. ``top``: the first folder under the split;
        for a photo in none, the folder that holds it.
    test_fraction
        Share of the photos that goes to ``Test`` (with ``top``: of the folders that hold them,
        since photos of one folder are near-copies). A hash of the path decides, so that a photo
        keeps its split when others are added.
    root
        The source's own name: the label of photos that lie in no folder below it.

    Raises
    ------
    RequestError
        If ``label`` is another word; if ``test_fraction`` isn't between 0 and 1, or the source has
        splits already.
    """
    if label not in ("parent", "top"):
        raise RequestError(f"--label is parent or top, not {label}")
    paths = files["path"]
    in_split = pc.match_substring_regex(paths, r"^(Training|Test)/")
    has_splits = bool(pc.any(in_split).as_py())
    if has_splits:
        files = files.filter(in_split)
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
    columns = [paths, splits, labels, filenames, files["size"], files["modified"]]
    table = pa.table(columns, schema=PHOTOS)
    return table.sort_by([("split", "ascending"), ("path", "ascending")])


def _draw(keys: pa.ChunkedArray, fraction: float, has_splits: bool) -> pa.ChunkedArray:
    if has_splits:
        raise RequestError(
            "--test-fraction is for a source without Training and Test folders, and this one has "
            "them: leave the option out"
        )
    if not 0 < fraction < 1:
        raise RequestError(f"--test-fraction is a share between 0 and 1, not {fraction:g}")
    digests = (hashlib.blake2b(k.encode(), digest_size=8).digest() for k in keys.to_pylist())
    draws = (int.from_bytes(digest, "big") / 2**64 for digest in digests)
    names = ["Test" if draw < fraction else "Training" for draw in draws]
    return pa.chunked_array([pa.array(names, pa.string())])


def layout_hint(files: pa.Table) -> str:
    """Return a sentence if Training and Test lie one folder deeper, else an empty string."""
    heads = {
        "/".join(path.split("/")[:2])
        for path in files["path"].slice(0, 100_000).to_pylist()
        if path.count("/") >= 2
    }
    inner = sorted({head.split("/")[0] for head in heads if head.split("/")[-1] in SPLITS})
    if not inner or inner[0] in SPLITS:
        return ""
    return f"Training and Test folders lie in {inner[0]}/: is that the source you mean?"
