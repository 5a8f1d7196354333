"""`pomona serve`: its options, and a process that ends calmly."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pomona.core.errors import RequestError
from pomona.model.artifact import Model
from pomona.serving import server
from tests.conftest import photo
from tests.service import KEY, until


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "fruits.example"])
def test_the_network_is_refused_without_a_key(host: str) -> None:
    with pytest.raises(RequestError, match="POMONA_API_KEYS"):
        server.check_access(host, (), public=False)
    server.check_access(host, (KEY,), public=False)
    server.check_access(host, (), public=True)


def test_keys_that_are_no_secret_are_refused() -> None:
    for weak in ("x", "üüüüüüüüüüüüüüüüüüüüüü", "0123456789abcde"):
        with pytest.raises(RequestError, match="at least 16"):
            server.check_access("127.0.0.1", (weak,), public=False)
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        server.check_access(host, (), public=False)


def is_closed(port: int) -> bool:
    """Whether nobody listens any more."""
    try:
        socket.create_connection(("127.0.0.1", port), 60).close()
    except OSError:
        return True
    return False


def test_the_command_answers_and_ends_calmly(model: Model, tmp_path: Path) -> None:
    """A real process: SIGTERM while a photo is on its way; it gets its answer, then the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pomona", "serve", "--model", str(model.folder)]
    with subprocess.Popen(
        [*command, "--port", str(port), "--isolate"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"POMONA_API_KEYS": f"{KEY}, second-key-0123456789"},
    ) as process:
        try:
            assert process.stderr is not None
            reply = process.stderr.readline() + process.stderr.readline()
            assert f"model {model.version}" in reply
            assert f"http://127.0.0.1:{port}" in reply
            assert KEY not in reply
            body = photo(1)
            head = "POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
            head += f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n"
            with socket.create_connection(("127.0.0.1", port), 60) as raw:
                raw.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
                assert raw.recv(10_000).startswith(b"HTTP/1.1 100 ")  # it waits for the photo
                raw.sendall(body[:100])
                process.send_signal(signal.SIGTERM)
                until(lambda: is_closed(port))
                raw.sendall(body[100:])
                assert raw.recv(10_000).startswith(b"HTTP/1.1 200 ")
            assert process.wait(60) == 0
            rest = process.stderr.read()
            assert "Traceback" not in rest
            assert KEY not in rest
        finally:
            process.kill()


def test_wrong_options_are_one_line(model: Model, tmp_path: Path, command: Any) -> None:
    for wrong, rule in (
        (("--host", "0.0.0.0"), "POMONA_API_KEYS"),
        (("--port", "99999"), "--port"),
        (("--queue", "0"), "at least 1"),
        (("--api-key", "short"), "at least 16"),
    ):
        ended, _, reply = command("serve", "--model", model.folder, *wrong)
        assert ended == 2
        assert rule in reply
        assert len(reply.strip().splitlines()) == 1
    ended, _, reply = command("serve", "--model", tmp_path, "--port", 0)
    assert ended == 2
    assert "there is no model" in reply
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended, _, reply = command("serve", "--model", model.folder, "--port", port)
    assert ended == 2
    assert "take another port" in reply
