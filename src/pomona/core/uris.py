"""Paths and URIs as users write them: which kind they are, and how to print them safely."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from pomona.core.errors import RequestError

_URI = re.compile(
    r"(?!file:)([a-z][a-z0-9+.-]*://|(dbfs|s3[an]?|gs|gcs|hdfs|abfss?|wasbs?|adl|viewfs):)", re.I
)


def redacted(text: str) -> str:
    """Return a URI without user, password and options, to be printed; a path as it is.

    A secret may hold unescaped slashes: after a colon that doesn't start a port, everything up to
    the last ``@`` counts as the secret.

    >>> redacted("s3a://KEY:SEC/RET@bucket/out?region=x"), redacted("hdfs://host:8020/a@b")
    ('s3a://bucket/out', 'hdfs://host:8020/a@b')
    >>> redacted("a@b?")
    'a@b?'
    """
    if not _URI.match(text):
        return text
    user = r"(?:[^/@:]*:(?!\d*(?:/|$)).*|[^/@]*)@"
    return re.sub(rf"^([^:/]+:/*){user}", r"\1", text.partition("?")[0])


def is_store(text: str) -> bool:
    """Whether a text is the URI of an object store that Arrow reads."""
    return re.match("(s3|gs|gcs)://", text, re.I) is not None


def refuse_uri(text: str, what: str) -> None:
    """Raise RequestError for a URI where a folder is needed; it says what to do instead."""
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
