"""The limit of all bodies together, in the server's own memory."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pomona.serving.service import MEMORY
from tests.conftest import photo
from tests.service import place, send_form

BODIES = [20_000_000] * 14 + [1_000_000] * 80
"""More than the limit holds, large ones and (for the part that is kept for them) small ones."""
PART = b'--x\r\nContent-Disposition: form-data; name="photo"; filename="a.jpg"\r\n\r\n'
KINDS = {"raw": ("image/jpeg", b""), "form": ("multipart/form-data; boundary=x", PART)}


def memory(pid: int, name: str) -> int:
    """Bytes of a process: VmRSS is what it holds now, VmHWM the most that it ever held."""
    status = Path(f"/proc/{pid}/status").read_text()
    (kilobytes,) = re.findall(rf"^{name}:\s+(\d+) kB", status, re.M)
    return int(kilobytes) << 10


def ask(url: str, kind: str, size: int) -> socket.socket:
    """Send a body that lacks its last byte: the server holds it, or has refused it."""
    media_type, start = KINDS[kind]
    head = f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {media_type}\r\n"
    raw = socket.create_connection(place(url), 60)
    with contextlib.suppress(OSError):  # refused, and closed while it sent
        raw.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode() + start)
        raw.sendall(os.urandom(size - 1 - len(start)))
    return raw


def answer(raw: socket.socket) -> bytes:
    """Send the last byte, if that is still wanted; return the answer's status."""
    with raw, contextlib.suppress(OSError):
        with contextlib.suppress(OSError):
            raw.sendall(b"x")
        return raw.recv(100)[9:12]
    return b"503"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
@pytest.mark.parametrize("kind", KINDS)
def test_all_bodies_take_no_more_memory_than_the_limit(kind: str) -> None:
    words = [sys.executable, "-m", "pomona", "serve", "--port", "0", "--workers", "1", "--quiet"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            url = next(found[0] for line in lines if (found := re.search(r"http://[\d.:]+", line)))
            assert send_form(url, photo(1)).status_code == 200
            before = memory(process.pid, "VmRSS")
            asking = [ask(url, kind, size) for size in BODIES]
            answers = [answer(raw) for raw in asking]
            most = memory(process.pid, "VmHWM") - before
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    assert b"503" in answers, "the limit was reached"
    assert MEMORY * 3 // 4 < most < MEMORY * 9 // 8
