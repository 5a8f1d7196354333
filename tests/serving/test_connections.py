"""Clients that are slow, silent or no HTTP: uvicorn with limits of ours."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pomona.model.artifact import Model
from pomona.serving import problem_details, server, uploads
from pomona.serving.app import Settings, create
from pomona.web import page
from tests.conftest import photo
from tests.service import place, running, send

HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"


@pytest.fixture(scope="module")
def impatient(model: Model) -> Iterator[tuple[str, int]]:
    """A service that waits for half a second where it waits for 10 to 30 otherwise."""
    limits = uploads.Limits(seconds=1.5, stall=0.5, body=100_000)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HEAD_SECONDS", "REST_SECONDS", "IDLE_SECONDS", "STUCK_SECONDS"):
            patch.setattr(server, name, 0.5)
        with running(create(lambda: model, Settings(workers=1, limits=limits))) as url:
            yield place(url)
            assert send(url, photo(1)).status_code == 200


@pytest.fixture
def raw(impatient: tuple[str, int]) -> Iterator[socket.socket]:
    with socket.create_connection(impatient, 60) as connection:
        yield connection


def is_cut(raw: socket.socket, more: bytes, pause: float = 0.02) -> bool:
    """Send the same again and again until the service ends the connection."""
    end = time.monotonic() + 60
    with contextlib.suppress(OSError):
        while time.monotonic() < end:
            raw.sendall(more)
            time.sleep(pause)
        return False
    return True


def test_a_silent_client_is_cut(raw: socket.socket) -> None:
    assert raw.recv(1) == b""


def test_a_head_that_never_ends_is_cut(raw: socket.socket) -> None:
    raw.sendall(HEAD)
    assert is_cut(raw, b"X-Padding: x\r\n", 0.05)


def test_a_head_that_is_too_long_is_cut(raw: socket.socket) -> None:
    assert is_cut(raw, b"X" * 1000, 0.0005)


@pytest.mark.parametrize("pause", [2.0, 0.3])
def test_a_body_that_stalls_or_trickles_is_a_timeout(raw: socket.socket, pause: float) -> None:
    raw.sendall(HEAD + b"Content-Length: 50000\r\n\r\nabc")
    raw.settimeout(pause)
    reply = b""
    for _ in range(200):
        try:
            reply = raw.recv(1000)
            break
        except TimeoutError:
            raw.sendall(b"x")
    assert reply.startswith(b"HTTP/1.1 408 ")


def test_an_empty_line_is_no_request(raw: socket.socket) -> None:
    raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert raw.recv(1000).startswith(b"HTTP/1.1 200 ")
    raw.sendall(b"\r\n")
    assert raw.recv(1) == b""


def test_a_refused_client_that_stays_is_cut(raw: socket.socket) -> None:
    raw.sendall(HEAD + b"Content-Encoding: gzip\r\nContent-Length: 5000\r\n\r\n")
    assert raw.recv(1000).startswith(b"HTTP/1.1 415 ")
    raw.sendall(bytes(5000))
    assert raw.recv(1) == b""


def test_a_refused_client_that_goes_on_sending_is_cut(raw: socket.socket) -> None:
    raw.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    assert is_cut(raw, b"10000\r\n" + bytes(0x10000) + b"\r\n")


def test_trailers_without_end_are_cut(raw: socket.socket) -> None:
    raw.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n")
    assert is_cut(raw, b"X: " + b"x" * 1000 + b"\r\n")


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
        raw.sendall(b"GET /large.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
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
