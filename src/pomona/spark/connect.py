"""Spark Connect: the address of a server, and whether it answers."""

from __future__ import annotations

import importlib.util
import re
import socket

from pomona.core.errors import MissingError, RequestError

PORT = 15002
"""Spark Connect's default."""
CONNECT_SECONDS = 20


def is_server(master: str) -> bool:
    """Tell whether a master is the address of a Spark Connect server.

    >>> is_server("sc://host:15002"), is_server("spark://host:7077")
    (True, False)
    """
    return master.startswith("sc://")


def redacted(master: str) -> str:
    """Return a master without what follows a server's address, which may hold a token.

    >>> redacted("sc://host:443/;token=secret"), redacted("local[2]")
    ('sc://host:443', 'local[2]')
    """
    return re.sub(r"^(sc://[^/;]*).*", r"\1", master)


def check_server(address: str) -> None:
    """Raise MissingError without gRPC, RequestError if no server answers (Spark waits minutes)."""
    if importlib.util.find_spec("grpc") is None:
        raise MissingError("--master sc://… needs gRPC: pip install 'pomona[connect]'")
    parts = re.fullmatch(r"sc://(\[[^\]]+\]|[^:/;\[\]]+)(?::(\d{1,5}))?(?:/.*)?", address)
    if parts is None:
        raise RequestError("--master of a Spark Connect server is sc://HOST:PORT")
    host, port = parts[1].strip("[]"), int(parts[2] or PORT)
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RequestError(
            f"no Spark Connect server answers at {host}:{port} ({error}): start one with Spark's "
            "sbin/start-connect-server.sh, or check --master"
        ) from error
