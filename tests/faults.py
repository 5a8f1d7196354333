"""A proxy in front of an S3 server, which injects faults.

Which requests fail is a function of method, path and how often the same was asked before, so that a
test sees the same faults in every run, whatever the order of its threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Plan = Callable[[str, str, int], str | None]
"""From (method, path, how often it was asked before) to a kind of fault, or None."""

KINDS = ("slow down", "internal", "hang", "cut", "reset")
ERRORS = {
    "slow down": (503, "SlowDown", "Please reduce your request rate."),
    "internal": (500, "InternalError", "We encountered an internal error."),
    "denied": (403, "AccessDenied", "Access Denied"),
}
HANG = 20.0
"""Seconds, longer than any client waits."""


def share(percent: float, kinds: tuple[str, ...] = KINDS, times: int = 1) -> Plan:
    """Let a percentage of the paths fail the first ``times`` times, each with one of the kinds."""

    def plan(method: str, path: str, before: int) -> str | None:
        digest = hashlib.blake2b(f"{method} {path}".encode(), digest_size=8).digest()
        draw = int.from_bytes(digest[:4], "big") / 2**32 * 100
        return kinds[digest[4] % len(kinds)] if before < times and draw < percent else None

    return plan


class Proxy(ThreadingHTTPServer):
    """Counts requests and lets some of them fail, by a plan."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.plan: Plan = lambda *_: None
        self.asked: Counter[tuple[str, str]] = Counter()
        self.faults: Counter[str] = Counter()
        self.log: list[tuple[str, str]] = []
        self.users: set[str] = set()
        self.guard = threading.Lock()
        self.ended = threading.Event()

    def fault(self, method: str, path: str) -> str | None:
        """Count a request and return its kind of fault, or None."""
        with self.guard:
            before = self.asked[method, path]
            self.asked[method, path] += 1
            self.log.append((method, path))
            plan = self.plan
        if kind := plan(method, path, before):  # outside the lock: a plan may wait
            with self.guard:
                self.faults[kind] += 1
        return kind

    def reset(self, plan: Plan | None = None) -> None:
        """Set the counts to zero and follow another plan."""
        with self.guard:
            self.plan = plan or (lambda *_: None)
            self.asked.clear()
            self.faults.clear()
            self.log.clear()
            self.users.clear()

    @property
    def options(self) -> str:
        """The options of S3 URIs that lead to this proxy."""
        place = f"http://127.0.0.1:{self.server_port}"
        return f"endpoint_override={place}&region=us-east-1&scheme=http"

    def handle_error(self, *_: Any) -> None:
        """Print nothing: clients that close connections are what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Proxy

    def _answer(self) -> None:
        body = self._body()
        signed = re.search("Credential=([^/]+)/", self.headers.get("Authorization", ""))
        self.server.users.add(signed[1] if signed else "nobody")
        fault = self.server.fault(self.command, unquote(self.path))
        if fault in ERRORS:
            self._error(*ERRORS[fault])
        elif fault == "hang":
            self.server.ended.wait(HANG)
            self.close_connection = True
        elif fault == "reset":
            # With a linger of 0 seconds, closing sends RST.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        else:
            self._forward(body, cut=fault == "cut")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815

    def handle_expect_100(self) -> bool:
        going = super().handle_expect_100()
        self.wfile.flush()  # otherwise the client waits a second before it sends the body
        return going

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def _forward(self, body: bytes, *, cut: bool) -> None:
        target = urlsplit(self.server.target)
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=30)
        heads = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
        heads["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body, heads)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        passed = ("transfer-encoding", "connection", "date", "server")
        heads = {k: v for k, v in answer.getheaders() if k.lower() not in passed}
        if self.command != "HEAD":
            heads = {k: v for k, v in heads.items() if k.lower() != "content-length"}
            heads["Content-Length"] = str(len(content))
        self._say(answer.status, heads, content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def _error(self, status: int, code: str, message: str) -> None:
        text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        heads = {"Content-Type": "application/xml", "Content-Length": str(len(text))}
        self._say(status, heads, b"" if self.command == "HEAD" else text)

    def _say(self, status: int, heads: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in heads.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def proxy(options: str) -> Iterator[Proxy]:
    """Start a proxy in front of the server that the options of an S3 URI name."""
    server = Proxy(parse_qs(options)["endpoint_override"][0])
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
