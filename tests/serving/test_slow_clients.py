"""Clients that send nothing, too slowly, or without end: the service ends the connection."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from pomona.model.artifact import Model
from pomona.serving import server, uploads
from pomona.serving.app import Settings, create
from tests.conftest import photo
from tests.service import place, running, send

HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"


@pytest.fixture(scope="module")
def impatient(model: Model) -> Iterator[tuple[str, int]]:
    """A service that waits for half a second where it waits for 10 to 30 otherwise."""
    limits = uploads.Limits(seconds=1.5, stall=0.5, body=100_000)
    with running(create(lambda: model, Settings(workers=1, limits=limits))) as url:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("HEAD_SECONDS", "REST_SECONDS", "IDLE_SECONDS", "STUCK_SECONDS"):
                patch.setattr(server, name, 0.5)
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
    raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
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
