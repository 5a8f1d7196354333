"""ASGI middleware before every route: host name, key, metrics, the access log, headers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Callable, Collection

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pomona.serving.problem_details import Problem
from pomona.serving.prometheus import Metrics

log = logging.getLogger("pomona.serving.app")
access = logging.getLogger("pomona.access")

PROBLEM = "pomona.problem"
"""Key of a request's scope: the code of its problem."""

GONE = 499
"""Logged for a client that has gone, as nginx does; it is never sent."""

METHODS = {"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"}

SAFE = {
    b"x-content-type-options": b"nosniff",
    b"cache-control": b"no-store",
    b"referrer-policy": b"no-referrer",
}
"""Headers of answers that don't set their own."""


UNKNOWN_HOST = (
    "The service isn't known by this host name: ask it by its address, or start it with "
    "--allow-host NAME."
)


class Gate:
    """Passes requests on, or refuses those for another host, or without a key."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        keys: Collection[str],  # clients need one of them; empty: no key is needed
        routes: Collection[str],  # that metrics and log name; others are "page" or "other"
        open_routes: Collection[str],  # need no key
        locked: Collection[tuple[str, str]],  # method, path: refused even if no key is set
        page: Callable[[str], bool | None],  # whether a file of the page needs a key; None: no file
        hosts: Collection[str] | None,  # names that requests may call the service by; None: any
    ) -> None:
        self.app, self.metrics = app, metrics
        self.keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.routes, self.open_routes, self.locked = routes, open_routes, locked
        self.page, self.hosts = page, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message["headers"]
                present = {name for name, _ in headers}
                headers.extend(pair for pair in SAFE.items() if pair[0] not in present)
            await send(message)

        async def refuse(problem: Problem) -> None:
            scope[PROBLEM] = problem.code
            if not status:
                await problem.response()(scope, receive, sending)

        try:
            if not all(self._is_own(value) for name, value in scope["headers"] if name == b"host"):
                await refuse(Problem(421, "unknown_host", UNKNOWN_HOST))
            elif self._needs_key(scope) and not self._has_key(scope):
                await refuse(_unauthorized(bool(self.keys)))
            else:
                await self.app(scope, receive, sending)
        except ClientDisconnect:
            status = status or GONE
        except asyncio.CancelledError:  # uvicorn's time for a graceful end is over
            headers = {"Connection": "close", "Retry-After": "1"}
            await refuse(Problem(503, "stopping", "The server stops.", headers))
        except Exception:
            log.exception("a bug")
            detail = "Something went wrong in the server; its log says what."
            await refuse(Problem(500, "internal_error", detail))
        finally:
            self._record(scope, status, time.perf_counter() - start)

    def _is_own(self, host: bytes) -> bool:
        """Whether a Host header names the service. An address can't be pointed elsewhere by DNS."""
        if self.hosts is None:
            return True
        name = re.sub(r":[0-9]*$", "", host.decode("latin-1")).lower().removesuffix(".")
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True

    def _needs_key(self, scope: Scope) -> bool:
        path = scope["path"]
        if (scope["method"], path) in self.locked:
            return True
        if not self.keys or path in self.open_routes:
            return False
        return self.page(path) is not False

    def _has_key(self, scope: Scope) -> bool:
        key = b""
        for name, value in scope["headers"]:
            if name == b"x-api-key":
                key = value
            elif name == b"authorization" and value[:7].lower() == b"bearer ":
                key = value[7:].strip()
        digest = hashlib.sha256(key).digest()
        # All are compared, so that the time doesn't reveal which one was nearly right.
        return any([hmac.compare_digest(digest, known) for known in self.keys])  # noqa: C419

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"]
        route = path if path in self.routes else ("other" if self.page(path) is None else "page")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self.metrics.request(route, method, status, seconds)
        if code := scope.get(PROBLEM):
            self.metrics.rejected(code)
        # Neither address nor query nor user agent: nothing that identifies the client.
        access.info("%s %s %d %.1f ms", method, route, status, 1e3 * seconds)


def _unauthorized(has_keys: bool) -> Problem:
    if not has_keys:
        detail = "This needs a key, and the service was started without any: set POMONA_API_KEYS."
        return Problem(403, "forbidden", detail)
    detail = "Send a key: Authorization: Bearer KEY."
    return Problem(401, "unauthorized", detail, {"WWW-Authenticate": "Bearer"})
