"""Object stores that Arrow speaks (``s3://``, ``gs://``): connect, and try again what may pass."""

from __future__ import annotations

import functools
import logging
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa

from pomona.core.errors import SourceError, first_line
from pomona.core.uris import redacted

log = logging.getLogger("pomona")


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


T = TypeVar("T")


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
        reason = first_line(error).replace(store, redacted(store))
        raise SourceError(f"{redacted(store)}: {reason}") from error


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


def is_transient(error: OSError) -> bool:
    """Tell whether an object store may answer better later: throttled, broken, too slow.

    >>> is_transient(OSError("AWS Error SLOW_DOWN during GetObject operation"))
    True
    >>> is_transient(OSError("AWS Error ACCESS_DENIED during GetObject operation"))
    False
    """
    return not isinstance(error, _LASTING_TYPES) and not _LASTING.search(str(error))


def retrying(call: Callable[[], T]) -> T:
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
            if number == TRIES - 1 or not is_transient(error) or time.monotonic() > end:
                raise
            log.info("trying again: %s", first_line(error))
            time.sleep(random.uniform(0, 2**number))
    raise AssertionError("the last try returns or raises")
