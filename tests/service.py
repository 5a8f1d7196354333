"""A service on a free port of this machine, and requests to it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx

from pomona.serving.problem_details import MEDIA_TYPE
from pomona.serving.server import address, listen, server

KEY = "0123456789abcdef-key"
JPEG = {"Content-Type": "image/jpeg"}


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """Run the application as ``pomona serve`` does, in a thread; gives its address."""
    with listen("127.0.0.1", 0) as opened:
        started = threading.Event()
        running_server = server(app, started.set)
        thread = threading.Thread(target=running_server.run, args=([opened],))
        thread.start()
        try:
            assert started.wait(60)
            yield address(opened)
        finally:
            running_server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def until(condition: Any, seconds: float = 60.0) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it didn't come to that"
        time.sleep(0.01)


def place(url: str) -> tuple[str, int]:
    """Return host and port, for a raw connection."""
    return "127.0.0.1", int(url.rpartition(":")[2])


def send(url: str, content: bytes, path: str = "/v1/predict", **headers: str) -> Any:
    return httpx.post(url + path, content=content, headers=JPEG | headers, timeout=120)


def send_form(url: str, *contents: bytes, path: str = "/v1/predict") -> Any:
    files = [("photo", (f"{n}.jpg", content, "image/jpeg")) for n, content in enumerate(contents)]
    return httpx.post(url + path, files=files, timeout=120)


def problem_code(reply: Any, status: int) -> str:
    """Check that a reply is a problem, and return its code."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == MEDIA_TYPE
    problem = reply.json()
    assert problem["status"] == status
    assert problem["detail"]
    assert "Traceback" not in reply.text
    return str(problem["code"])
