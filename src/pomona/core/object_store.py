"""Object stores that Arrow reads (``s3://``, ``gs://``): connections, retries, timeouts."""

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
"""Concurrent reads of one worker: on object stores latency dominates (benchmarks/reading.py)."""

TRIES = 4
"""Attempts of `retrying`; the S3 client makes up to `S3_ATTEMPTS` requests in each."""

PATIENCE = 45.0
"""Seconds after which a failed call isn't repeated."""

S3_ATTEMPTS = 3
"""Requests that the S3 client makes by itself, with growing pauses: when one page of a long listing
fails, the listing must not start again."""

REQUEST_TIMEOUT, CONNECT_TIMEOUT = 5.0, 3.0
"""Seconds without data, and without a connection, after which a request is given up."""

GS_SECONDS = 10
"""Seconds that Google's client retries by itself; its own default is 15 minutes."""

T = TypeVar("T")


@functools.lru_cache(maxsize=8)
def connect(store: str, *, writes: bool = False) -> Any:
    """Return the Arrow file system of an object store's URI. Runs on workers, too.

    With ``writes`` a small file takes one request; a missing bucket is then noticed on writing.
    Raises SourceError if the URI has an option that Arrow doesn't know, OSError if the bucket's
    region must be looked up and the store doesn't answer.
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

    # The file system that Arrow makes from a URI tries 31 times, every 0.2 s, whatever the error,
    # and no option changes that: it keeps a throttled store throttled, and a request that hangs
    # takes 99 s. Here it only checks the options and finds the bucket's region.
    from_uri = FileSystem.from_uri(store)[0]
    user, _, secret = urlsplit(store).netloc.rpartition("@")[0].partition(":")
    defaults = {
        "access_key": user or None,
        "secret_key": secret or None,
        "region": from_uri.region,
        "endpoint_override": os.getenv("AWS_ENDPOINT_URL_S3", os.getenv("AWS_ENDPOINT_URL")),
        "request_timeout": REQUEST_TIMEOUT,
        "connect_timeout": CONNECT_TIMEOUT,
        "allow_delayed_open": writes,
    }
    booleans = {"true": True, "false": False}
    options = {k: booleans.get(v, v) for k, v in parse_qsl(store.partition("?")[2])}
    strategy = AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS)
    return S3FileSystem(**{**defaults, **options}, retry_strategy=strategy)


_PERMANENT = re.compile(
    # The names of S3's errors, and the status of those without a name: a HEAD's answer has no body.
    r"AWS Error (?:\w*ACCESS_DENIED|\w*NO_SUCH_|\w*NOT_FOUND|INVALID_|MISSING_|MALFORMED_|"
    r"SIGNATURE_|INCOMPLETE_|UNRECOGNIZED_|OPT_IN_|OBJECT_NOT_IN|REQUEST_EXPIRED|VALIDATION)|"
    r"HTTP status (?:3\d\d|4(?!08|29)\d\d)|"
    r"PERMISSION_DENIED|UNAUTHENTICATED|FAILED_PRECONDITION|INVALID_ARGUMENT"  # Google's
)
_PERMANENT_TYPES = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)


def is_transient(error: OSError) -> bool:
    """Tell whether a later attempt may succeed: the store was throttled, broken or too slow.

    >>> is_transient(OSError("AWS Error SLOW_DOWN during GetObject operation"))
    True
    >>> is_transient(OSError("AWS Error ACCESS_DENIED during GetObject operation"))
    False
    """
    return not isinstance(error, _PERMANENT_TYPES) and not _PERMANENT.search(str(error))


def retrying(call: Callable[[], T]) -> T:
    """Return what ``call`` returns; repeat it after a transient error. Runs on workers, too.

    The pauses are random, up to 1, 2 and 4 seconds, so that workers that failed together don't
    retry together. Raises the last attempt's OSError: at once if it is permanent, else after
    `TRIES` or `PATIENCE`.
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
