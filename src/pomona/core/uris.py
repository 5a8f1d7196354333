"""Paths and URIs as the user writes them: what they are, and how they may be printed."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from pomona.core.errors import RequestError

_URI = re.compile(
    r"(?!file:)([a-z][a-z0-9+.-]*://|(dbfs|s3[an]?|gs|gcs|hdfs|abfss?|wasbs?|adl|viewfs):)", re.I
)


def redacted(text: str) -> str:
    """Return a URI as it may be printed: without user, password and options; a path as it is.

    A secret may hold slashes that nobody escaped: what follows a colon that is no port's goes up to
    the last ``@``.

    >>> shown("s3a://KEY:SEC/RET@bucket/out?region=x"), shown("hdfs://host:8020/a@b"), shown("a@b?")
    ('s3a://bucket/out', 'hdfs://host:8020/a@b', 'a@b?')
    """
    if not _URI.match(text):
        return text
    user = r"(?:[^/@:]*:(?!\d*(?:/|$)).*|[^/@]*)@"
    return re.sub(rf"^([^:/]+:/*){user}", r"\1", text.partition("?")[0])


def is_store(text: str) -> bool:
    """Whether a name is an object store's URI."""
    return re.match("(s3|gs|gcs)://", text, re.I) is not None


def refuse_uri(text: str, what: str) -> None:
    """Refuse a URI where a folder is needed.

    Raises
    ------
    RequestError
        With what to do instead.
    """
    if not _URI.match(text):
        return
    if is_store(text):
        raise RequestError(
            f"{what} is a folder here, not {redacted(text)}: run, extract, reduce, train, report, "
            "export, publish, forget and status take object stores; elsewhere pomona pull and "
            "pomona push copy OUT"
        )
    raise RequestError(
        f"{what} is a folder, s3://… or gs://…, not {redacted(text)}: write s3:// for s3a://, "
        "or take a folder of the driver and copy it afterwards (docs/storage.md)"
    )


def local_path(text: str) -> Path:
    """Return the absolute path of a path or a ``file:`` URI."""
    if text.startswith("file:"):
        text = unquote(re.sub("^file:(//[^/]*)?", "", text))
        text = text[1:] if re.match(r"/[A-Za-z]:/", text) else text  # file:///C:/photos
    return Path(text).expanduser().resolve()
