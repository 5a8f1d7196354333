"""Fuzz `pomona.serving.uploads.photos`: any request gives photos or a problem."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from harness import atheris, fuzz

with atheris.instrument_imports(include=["pomona.serving", "python_multipart", "starlette"]):
    from starlette.requests import ClientDisconnect, Request

    from pomona.serving import uploads
from pomona.serving.problem_details import Problem

LIMITS = uploads.Limits(body=4096, photos=3)

loop = asyncio.new_event_loop()


def target(content: bytes) -> None:
    """Send the bytes as a request, in chunks: its first line is the type, the second the coding."""
    kind, _, rest = content.partition(b"\n")
    encoding, _, body = rest.partition(b"\n")
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    if encoding:
        headers.append((b"content-encoding", encoding))
    budget = uploads.Budget(1 << 16)
    try:
        with budget.share() as share:
            photos = loop.run_until_complete(uploads.photos(_request(headers, body), LIMITS, share))
            assert 1 <= len(photos) <= LIMITS.photos
            assert sum(map(len, photos)) <= share.used <= LIMITS.whole
    except Problem as problem:
        assert 400 <= problem.status < 600
        problem.response()
    except ClientDisconnect:
        pass
    assert budget.used == 0


def _request(headers: list[tuple[bytes, bytes]], body: bytes) -> Request:
    step = 1 + len(body) // 7
    chunks = [body[n : n + step] for n in range(0, len(body), step)] or [b""]
    waiting = iter(chunks)
    left = len(chunks)

    async def receive() -> dict[str, Any]:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": next(waiting), "more_body": left > 0}

    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)


def seeds() -> Iterator[bytes]:
    """Return bodies of every kind, whole and cut."""
    yield b"image/jpeg\n\n\xff\xd8\xff"
    yield b"application/octet-stream\nidentity\nx"
    yield b"text/html\n\n<p>"
    part = b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\nphoto\r\n'
    form = b"multipart/form-data; boundary=x\n\n"
    yield form + part + b"--x--\r\n"
    yield form + part * 4 + b"--x--\r\n"
    yield form + part[:-9]
    yield form + b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\ntext\r\n--x--\r\n'
    yield b'multipart/form-data; boundary="x y"; charset=utf-16\n\n--x y\r\n\r\n\r\n--x y--'
    yield form + part.replace(b"form-data", b"attachment").replace(b"a", b"\xe9") + b"--x--"


if __name__ == "__main__":
    fuzz(target, seeds(), rss_mb=1024)
