"""Clients that read slowly, or speak another protocol: uvicorn with changes of ours."""

from __future__ import annotations

import array
import contextlib
import fcntl
import http.client
import json
import re
import socket
import termios
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pomona.model.artifact import Model
from pomona.serving import problem_details, server
from pomona.serving.app import Settings, create
from pomona.web import page
from tests.conftest import photo
from tests.service import place, running, send, until


@contextlib.contextmanager
def large_file_asked_for(model: Model, size: int) -> Iterator[socket.socket]:
    """A connection with a small buffer, on which a file of so many bytes is to come."""
    app = create(lambda: model, Settings(workers=1))
    large = page.File(bytes(size), "application/octet-stream")
    app.state.service.site = app.state.service.site | {"large.bin": large}
    with running(app) as url, socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(10)
        raw.connect(place(url))
        raw.sendall(b"GET /large.bin HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        yield raw


def test_a_client_that_doesnt_read_is_cut(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STUCK_SECONDS", 0.5)
    lost, connection_lost = threading.Event(), server._Protocol.connection_lost

    def lose(self: server._Protocol, error: Exception | None) -> None:
        connection_lost(self, error)
        lost.set()

    monkeypatch.setattr(server._Protocol, "connection_lost", lose)
    with large_file_asked_for(model, 30 << 20) as raw:
        assert lost.wait(60)
        size = 0
        while more := raw.recv(1 << 16):
            size += len(more)
    assert size < 20 << 20


def test_a_client_that_reads_slowly_gets_all(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads four times, each time after most of the limit has passed by the server's clock.

    The whole takes longer than `STUCK_SECONDS`, and than the next request may be waited for.
    """
    clock, looks = SimpleNamespace(now=0.0), threading.Semaphore(0)
    is_late = server._Protocol.is_late

    def look(self: server._Protocol, now: float) -> bool:
        late = is_late(self, now)
        looks.release()
        return late

    monkeypatch.setattr(server, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(server._Protocol, "is_late", look)
    with large_file_asked_for(model, 30 << 20) as raw:
        size = 0
        for part in range(1, 5):
            while size < part * (3 << 20):
                size += len(raw.recv(1 << 16))
            while looks.acquire(blocking=False):
                pass
            for _ in range(2):  # a look that began before the reading may not have seen it
                assert looks.acquire(timeout=60)
            clock.now += 0.7 * server.STUCK_SECONDS
        while more := raw.recv(1 << 16):
            size += len(more)
    assert size > 30 << 20


def test_trailers_are_not_kept() -> None:
    """They come after the body, and would be added to the headers without end."""
    protocol = server._Protocol.__new__(server._Protocol)
    protocol.headers, protocol.expect_100_continue = [], False
    protocol.on_header(b"a", b"1")
    protocol._body = True
    protocol.on_header(b"b", b"2")
    assert protocol.headers == [(b"a", b"1")]


def test_a_client_of_http_2_gets_its_answer(url: str) -> None:
    """It asks for an upgrade first, which a server may ignore."""
    asks = {"Upgrade": "h2c", "Connection": "Upgrade, HTTP2-Settings", "HTTP2-Settings": "AAMA"}
    assert send(url, photo(1), **asks).status_code == 200


def test_an_upgrade_that_is_cut_anywhere_keeps_the_body(url: str) -> None:
    """TCP may cut a head at any byte."""
    body = photo(1)
    asks = "Connection: Upgrade, HTTP2-Settings\r\nUPGRADE: h2c\r\nHTTP2-Settings: AAMA\r\n"
    post = f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\n{asks}Content-Type: image/jpeg\r\n"
    head = f"{post}Content-Length: {len(body)}\r\n\r\n".encode()
    first, last = head.index(b"UPGRADE") - 2, head.index(b"UPGRADE") + len("UPGRADE: h2c\r\n")
    cuts = [*range(first, last), len(head) - 3, len(head) - 1, len(head), len(head) + 1]
    with socket.create_connection(place(url), 60) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for cut in cuts:
            for part in ((head + body)[:cut], (head + body)[cut:]):
                raw.sendall(part)
                # The server has read this part before the next one is sent.
                until(lambda: not unread(raw))
            assert answered(raw) == 200, cut


def test_a_line_that_only_looks_like_an_upgrade_is_left(url: str) -> None:
    """A photo's bytes, and the value of another header, also where a packet begins with them."""
    odd = photo(1) + b"\r\nUpgrade: h2c\r\n\r\n"
    head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nX-A: "
    rest = b"upgrade: a\r\nContent-Length: %d\r\n\r\n%b" % (len(odd), odd)
    with socket.create_connection(place(url), 60) as raw:
        raw.sendall(head)
        until(lambda: not unread(raw))
        raw.sendall(rest)
        assert answered(raw) == 200


def unread(raw: socket.socket) -> int:
    """Bytes that the peer's kernel hasn't acknowledged yet."""
    waiting = array.array("i", [0])
    fcntl.ioctl(raw, termios.TIOCOUTQ, waiting)
    return waiting[0]


def answered(raw: socket.socket) -> int:
    """Read one answer and return its status."""
    reply = http.client.HTTPResponse(raw)
    reply.begin()
    reply.read()
    return reply.status


def test_uvicorn_is_the_version_whose_internals_are_known() -> None:
    """`pomona.serving.server` overrides methods of uvicorn that aren't documented.

    A new release may rename them, and the limits above would no longer hold: pyproject.toml caps
    the version, and whoever raises the cap runs the tests of this file with the new one.
    """
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (cap,) = re.findall(r'"uvicorn>=[0-9.]+,<0.([0-9]+)"', text)
    assert version("uvicorn").startswith(f"0.{int(cap) - 1}.")
    for name in ("connection_made", "data_received", "on_message_begin", "on_header",
                 "on_headers_complete", "on_message_complete", "on_response_complete",
                 "pause_writing", "resume_writing", "send_400_response"):  # fmt: skip
        assert name in server._Protocol.__dict__
        assert callable(getattr(HttpToolsProtocol, name, None)), name
    assert callable(uvicorn.Server.on_tick)


def test_what_is_no_http_is_a_problem(url: str) -> None:
    for wrong in (
        b"nonsense\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ):
        with socket.create_connection(place(url), 10) as raw:
            raw.sendall(wrong)
            reply = b""
            while more := raw.recv(4096):
                reply += more
        head, _, body = reply.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert problem_details.MEDIA_TYPE.encode() in head
        assert json.loads(body)["code"] == "malformed"
