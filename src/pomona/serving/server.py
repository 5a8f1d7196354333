"""Run the service with uvicorn: addresses, keys, time limits for clients, a graceful end.

`_Server` and `_Protocol` override methods of uvicorn that aren't documented, so pyproject.toml caps
its version.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import socket
import sys
import time
from collections.abc import Callable, Collection
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pomona.core.errors import RequestError
from pomona.core.printable import LogFormatter
from pomona.serving.problem_details import Problem

HEAD_SECONDS = 10.0  # that a request's head may take, from the connection or its first byte
HEAD_BYTES = 64 << 10  # size limit of a request's head
REST_SECONDS = 10.0  # that the rest of a body may take after its answer: limits refused uploads
STUCK_SECONDS = 30.0  # that a client may leave an answer unread
IDLE_SECONDS = 15  # that a connection may wait for its next request
END_SECONDS = 30  # that requests in flight have after SIGTERM
CONNECTIONS = 1000  # most open connections; further ones are closed at once
LEAST_KEY = 16  # least number of characters of a key


def own_names(host: str, allowed: Collection[str], keys: Collection[str]) -> frozenset[str] | None:
    """Return the names by which a service may be asked, beside its addresses; None: by any.

    Without a key, any web page could read the service by pointing a name of its own at this machine
    (DNS rebinding): its browser then takes both for one site, but names the page's host. With a key
    that page has none. ``allowed`` are further names, as a proxy passes them on; ``*`` allows any.

    Raises
    ------
    RequestError
        If a name isn't one.
    """
    for name in allowed:
        if name != "*" and not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise RequestError(
                f"--allow-host is a name such as fruit.example, without scheme and port, not {name}"
            )
    if keys or "*" in allowed:
        return None
    machine = socket.gethostname()
    short = machine.partition(".")[0]
    names = ("localhost", machine, short, f"{short}.local", host, *allowed)
    return frozenset(name.lower().removesuffix(".") for name in names)


def check_access(host: str, keys: tuple[str, ...], *, public: bool) -> None:
    """Refuse to serve the network without a key, unless `public` asks for it.

    Raises
    ------
    RequestError
        If the address isn't a loopback address and there is neither a key nor ``public``, or a
        key is too short.
    """
    if any(len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() for key in keys):
        raise RequestError(
            f"a key has at least {LEAST_KEY} characters of ASCII: openssl rand -hex 16 makes one"
        )
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        loopback = False
    if not (keys or public or loopback):
        raise RequestError(
            f"--host {host} lets others ask: set POMONA_API_KEYS (or --api-key), or add --public"
        )


def listen(host: str, port: int) -> socket.socket:
    """Open the address for connections; port 0 takes any free one.

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
    """Return the URL for a browser."""
    host, port = opened.getsockname()[:2]
    name = "localhost" if host in ("0.0.0.0", "::") else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def serve(app: Any, opened: socket.socket, on_start: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or Ctrl-C; requests in flight are still answered."""
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn re-raises the signal at the end
        server(app, on_start).run(sockets=[opened])


def server(app: Any, on_start: Callable[[], None] = lambda: None) -> uvicorn.Server:
    """Return the server as `serve` runs it."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,  # uvicorn's own shows the client's address
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

    async def on_tick(self, counter: int) -> bool:
        if counter % 5 == 0:  # twice a second
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, _Protocol) and connection.is_late(now):
                    connection.transport.abort()
        return await super().on_tick(counter)


class _Protocol(HttpToolsProtocol):
    """HTTP with time limits.

    uvicorn by itself waits without limit for a request's head, for the rest of a body that was
    refused, and for a client that doesn't read its answer; and it stores all headers, also
    trailers.
    """

    _head = 0  # bytes of the head so far; -1: no head is being received
    _line = b""  # of the head: what came after its last line break
    _body = False  # whether a body is being received
    # Since when the connection waits for a head, for the rest of a body, for its answer to be read.
    _waits: float | None = None
    _rests: float | None = None
    _stuck: float | None = None
    _left = -1  # bytes not sent yet, when last checked

    def is_late(self, now: float) -> bool:
        """Whether the client has taken too long. One that reads, however slowly, isn't late."""
        if (
            self._stuck is not None
            and (left := self.transport.get_write_buffer_size()) != self._left
        ):
            self._stuck, self._left = now, left
        head = HEAD_SECONDS if self._head > 0 or self.cycle is None else IDLE_SECONDS
        waits = self._waits if self._stuck is None else None  # the answer is still being read
        limits = ((waits, head), (self._rests, REST_SECONDS), (self._stuck, STUCK_SECONDS))
        return any(since is not None and now - since > most for since, most in limits)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waits = time.monotonic()
        if len(self.connections) > CONNECTIONS:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._head > HEAD_BYTES:
            self.transport.abort()
            return
        if self._head >= 0:
            if not self._head:
                self._waits = time.monotonic()
            self._head += len(data)
            # The last line may be cut: it waits until it is whole.
            lines, newline, self._line = (self._line + data).rpartition(b"\n")
            if newline:
                super().data_received(_without_upgrade(lines + newline))
            if self._head >= 0 or self.transport.is_closing():
                return
            data, self._line = self._line, b""  # the head is over: this is of the body
        if data:
            super().data_received(data)

    def on_message_begin(self) -> None:
        self._head, self._waits = max(0, self._head), time.monotonic()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._body:  # trailers are ignored
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head, self._body, self._waits = -1, True, None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._head, self._body, self._rests = 0, False, None
        if self.cycle.response_complete:
            self._waits = time.monotonic()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self._body:
            self._rests = time.monotonic()
        else:
            self._waits = time.monotonic()
        super().on_response_complete()

    def pause_writing(self) -> None:
        self._stuck = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stuck = None
        if self._waits is not None:
            self._waits = time.monotonic()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        body = Problem(400, "malformed", "This is no HTTP that can be read.").response()
        head = "".join(f"{name}: {value}\r\n" for name, value in body.headers.items())
        start = f"HTTP/1.1 400 Bad Request\r\n{head}connection: close\r\n\r\n"
        self.transport.write(start.encode() + bytes(body.body))
        self.transport.close()


def _without_upgrade(data: bytes) -> bytes:
    """Hide an Upgrade header from the parser, which would take the body for another protocol's.

    HTTP/2 clients send one with their first request; a server may ignore it (RFC 9110, 7.8).
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    return re.sub(rb"(?im)^upgrade:", b"x-grade:", head) + end + rest


def log_to_stderr(*, access: bool) -> None:
    """Write the service's log to stderr, with ``access`` also a line for each request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter())
    for name in ("pomona", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if name == "pomona" else logging.WARNING)
        logger.addHandler(handler)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it logs every bad form
    logging.getLogger("pomona.access").disabled = not access
