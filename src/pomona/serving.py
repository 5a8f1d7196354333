"""Run the service with uvicorn: addresses, keys, slow clients, a calm end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pomona.errors import RequestError

HEAD_SECONDS = 10.0
"""Time that a request's head may take, from the connection or its first byte on."""

HEAD_BYTES = 64 << 10
"""Bytes that a request's head may have."""

REST_SECONDS = 10.0
"""Time that the rest of a body may take after its answer: a refused upload isn't read for ever."""

CONNECTIONS = 1000
"""Open connections; beyond, new ones are closed at once."""

IDLE_SECONDS = 15
"""Time that a connection may wait for its next request."""

END_SECONDS = 30
"""Time that requests in flight have after SIGTERM."""


LEAST_KEY = 16
"""Characters of a key."""


def check_access(host: str, keys: tuple[str, ...], *, public: bool) -> None:
    """Refuse to answer the whole network without a key, unless that is what was asked for.

    Raises
    ------
    RequestError
        If the address isn't this machine's own and there is neither a key nor ``public``.
    """
    if any(len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() for key in keys):
        raise RequestError(
            f"a key has at least {LEAST_KEY} characters of ASCII: openssl rand -hex 16 makes one"
        )
    if keys or public or _is_loopback(host):
        return
    raise RequestError(
        f"--host {host} lets others ask: set POMONA_API_KEYS (or --api-key), or add --public"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Open the address; port 0 takes any that is free.

    Raises
    ------
    RequestError
        If it is in use, or isn't this machine's.
    """
    if not 0 <= port <= 65535:
        raise RequestError(f"--port is 0 to 65535, not {port}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise RequestError(
            f"--host {host} --port {port} can't be opened ({error.strerror}): take another port, "
            "or stop what uses it"
        ) from error


def address(opened: socket.socket) -> str:
    """Return the address for a browser."""
    host, port = opened.getsockname()[:2]
    name = "localhost" if host in ("0.0.0.0", "::") else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def serve(app: Any, opened: socket.socket, on_start: Callable[[], None] = lambda: None) -> None:
    """Answer until SIGTERM or Ctrl-C; what is in flight then is still answered."""
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn passes the signal on at the end
        server(app, on_start).run(sockets=[opened])


def server(app: Any, on_start: Callable[[], None] = lambda: None) -> uvicorn.Server:
    """Return the server as `serve` runs it."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        lifespan="on",
        log_config=None,
        access_log=False,  # uvicorn's own has the client's address
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=END_SECONDS,
    )
    return _Server(config, on_start)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_start()


class _Protocol(HttpToolsProtocol):
    """HTTP with an end to patience.

    uvicorn by itself waits for a request's head, and reads on what it refused, for ever.
    """

    _timer: asyncio.TimerHandle | None = None
    _head = 0  # bytes since the head began; -1: there is none under way
    _body = False  # whether a body is under way

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
            return
        self._close_in(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._be_patient()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head > HEAD_BYTES:
            self.transport.abort()
            return
        if self._head >= 0:
            self._head += len(data)
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._head = 0
        self._close_in(HEAD_SECONDS)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head, self._body = -1, True
        self._be_patient()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._body = False
        self._be_patient()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self._body:
            self._close_in(REST_SECONDS)
        super().on_response_complete()

    def _close_in(self, seconds: float) -> None:
        self._be_patient()
        self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _be_patient(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def log_to_stderr(*, access: bool) -> None:
    """Show the service's log, and with ``access`` a line for each request, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("pomona", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if name == "pomona" else logging.WARNING)
        logger.addHandler(handler)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it tells of each bad form
    logging.getLogger("pomona.access").disabled = not access
