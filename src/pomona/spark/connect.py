"""Spark Connect: a server's address, and whether somebody answers there."""

from __future__ import annotations

import importlib.util
import re
import socket

from pomona.core.errors import MissingError, RequestError

PORT = 15002
"""Spark Connect's own."""
PATIENCE_SECONDS = 20


def is_server(master: str) -> bool:
    """Whether a master is the address of a Spark Connect server.

    >>> is_server("sc://host:15002"), is_server("spark://host:7077")
    (True, False)
    """
    return master.startswith("sc://")


def redacted(master: str) -> str:
    """Return a master as it may be shown: what follows a server's address may hold a token.

    >>> shown("sc://host:443/;token=secret"), shown("local[2]")
    ('sc://host:443', 'local[2]')
    """
    return re.sub(r"^(sc://[^/;]*).*", r"\1", master)


def check_server(address: str) -> None:
    """Raise an error in one line if no server answers; Spark itself would try for minutes.

    Raises
    ------
    MissingError
        If what speaks to it isn't installed.
    RequestError
        If the address is none, or nobody answers there.
    """
    if importlib.util.find_spec("grpc") is None:
        raise MissingError("--master sc://… needs gRPC: pip install 'pomona[connect]'")
    where = re.fullmatch(r"sc://(\[[^\]]+\]|[^:/;\[\]]+)(?::(\d{1,5}))?(?:/.*)?", address)
    if where is None:
        raise RequestError("--master of a Spark Connect server is sc://HOST:PORT")
    host, port = where[1].strip("[]"), int(where[2] or PORT)
    try:
        socket.create_connection((host, port), PATIENCE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RequestError(
            f"no Spark Connect server answers at {host}:{port} ({error}): start one with Spark's "
            "sbin/start-connect-server.sh, or check --master"
        ) from error
