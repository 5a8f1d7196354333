"""What the routes share: the model that answers, its queue, its readiness and its replacement."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import anyio
import anyio.to_thread
from fastapi import Request
from starlette.requests import ClientDisconnect

from pomona.core.cpus import available_cpus
from pomona.core.errors import PomonaError
from pomona.core.schema import TOO_LARGE
from pomona.export.phone import page_files
from pomona.model.artifact import Model
from pomona.photos.isolation import Guard
from pomona.serving import uploads, worker_pool
from pomona.serving.problem_details import of_photo
from pomona.serving.prometheus import Metrics
from pomona.serving.uploads import Budget, Limits, overloaded
from pomona.serving.worker_pool import FullError, Kind, Loaded, Pool, Row
from pomona.web.page import Site

log = logging.getLogger("pomona.serving.app")

MEMORY = 256 << 20
"""Bytes of photos held at a time, over all requests; more if one request may be large."""

FRESH = 2.0
"""Seconds for which `/readyz` repeats the result of its last check."""

CHECK = 5.0
"""Seconds within which a check needs its answer; it goes before all photos that wait."""

REQUEST = 8.0
"""Seconds that the photos of one request may take to decode together, by estimate."""

Fetch = Callable[[], Model]
"""Reads the model, at the start and whenever it may have changed."""


@dataclass(frozen=True)
class Settings:
    """How the service answers; see ``pomona serve --help``."""

    keys: tuple[str, ...] = ()  # clients need one of them; empty: no key is needed
    limits: Limits = field(default_factory=Limits)
    queue: int | None = None  # photos that may wait; None: 16 for each worker
    workers: int | None = None  # threads; None: one for each core
    device: str = "auto"
    watch: float = 0.0  # seconds between checks for a new model; 0: never
    origins: tuple[str, ...] = ()  # web sites whose pages may send requests (CORS)
    hosts: frozenset[str] | None = frozenset({"localhost"})
    """Names that requests may call the service by, beside IP addresses; None: any."""
    guard: Guard = ""  # child: decode in child processes
    # That may be decoded: fewer than for tables, since a worker may need 10 bytes for each.
    pixels: int = 24_000_000


class Service:
    """A model that answers photos, until another one takes over."""

    def __init__(self, fetch: Fetch, settings: Settings) -> None:
        self.fetch, self.settings = fetch, settings
        loaded = self._load(fetch())
        self.pool = Pool(loaded, settings.workers, settings.queue)
        self.site = self._page_files(loaded.model)
        self.budget = Budget(max(MEMORY, 4 * settings.limits.body))
        self.metrics = Metrics()
        self.metrics.model(loaded.model.version)
        self.metrics.watch_queue(lambda: self.pool.waiting)
        self._checked, self._healthy = 0.0, False
        self._checking, self._changing = asyncio.Lock(), asyncio.Lock()

    @property
    def model(self) -> Model:
        """The model that answers now."""
        return self.pool.loaded.model

    def _load(self, model: Model) -> Loaded:
        return worker_pool.load(
            model,
            device=self.settings.device,
            threads=self.settings.workers or available_cpus(),
            guard=self.settings.guard,
            pixels=self.settings.pixels,
        )

    def _page_files(self, model: Model) -> Site:
        return page_files(model, service=True, needs_key=bool(self.settings.keys))

    # --- answers ---

    async def answer(self, request: Request, kind: Kind) -> list[tuple[Row, Loaded]]:
        """Read a request's photos, queue them, and wait for a row for each.

        Raises
        ------
        Problem
            If the request can't be taken, or its only photo can't be used.
        ClientDisconnect
            If the client has gone.
        """
        if self.pool.is_full:  # before the body is read: nobody uploads in vain
            raise overloaded()
        with self.budget.share() as share:
            contents = await uploads.photos(request, self.settings.limits, share)
            if len(contents) > 1:  # one alone has the limits of `pomona.photos.decoding`
                await anyio.to_thread.run_sync(self._check_costs, contents)
            try:
                futures = self.pool.submit(kind, contents)
            except FullError:
                raise overloaded() from None
            rows = await self._while_connected(request, futures)
        if len(rows) == 1 and (code := rows[0][0]["error"]):
            raise of_photo(code)
        self.metrics.answers(row for row, _ in rows)
        return rows

    def _check_costs(self, contents: Sequence[bytes]) -> None:
        """Raise a problem if the photos of a request would hold a worker for too long together."""
        if sum(map(self.pool.loaded.seconds, contents)) > REQUEST:
            problem = of_photo(TOO_LARGE)
            problem.detail = (
                f"The photos would take over {REQUEST:g} seconds to decode: send fewer at a time, "
                "or smaller ones."
            )
            raise problem

    async def _while_connected(
        self, request: Request, futures: Sequence[Future[tuple[Row, Loaded]]]
    ) -> list[tuple[Row, Loaded]]:
        """Wait for rows; if the client goes, photos that no thread has begun are dropped."""
        rows = [asyncio.wrap_future(future) for future in futures]
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            pending: set[asyncio.Future[object]] = {*rows, gone}  # type: ignore[arg-type]
            while len(pending) > 1:
                _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if gone not in pending:
                    raise ClientDisconnect
            for error in [row.exception() for row in rows]:  # of all, or asyncio complains
                if error:
                    raise error
            return [row.result() for row in rows]
        finally:
            gone.cancel()
            if sum(future.cancel() for future in futures):
                self.pool.drop_cancelled()

    # --- readiness ---

    async def is_ready(self) -> bool:
        """Return whether a photo gets an answer, as of `FRESH` seconds ago at most."""
        async with self._checking:  # one check at a time: it goes before all photos that wait
            if time.monotonic() - self._checked > FRESH:
                self._healthy = await self._gets_answer()
                self._checked = time.monotonic()
            return self._healthy

    async def _gets_answer(self) -> bool:
        try:
            (future,) = self.pool.submit("predict", [worker_pool.sample()], first=True)
            with anyio.fail_after(CHECK):
                row, _ = await asyncio.wrap_future(future)
            worker_pool.check(row)
        except TimeoutError:
            log.error("not ready: a photo got no answer within %g s", CHECK)
            return False
        except Exception:
            log.exception("not ready")
            return False
        return True

    # --- another model ---

    async def renew(self) -> bool:
        """Read the model anew, try it, and let it answer. Returns whether it is another one.

        Raises
        ------
        PomonaError, RuntimeError, OSError
            If it can't be read, or its answer is wrong: the old one stays.
        """
        async with self._changing:
            return await anyio.to_thread.run_sync(self._replace)

    def _replace(self) -> bool:
        model = self.fetch()
        if model.about["digest"] == self.model.about["digest"]:
            return False
        loaded, site = self._load(model), self._page_files(model)
        self.pool.loaded = loaded  # from the next photo that a thread takes
        self.site = site
        self.metrics.model(model.version)
        log.info("model %s answers now", model.version)
        return True

    async def watch(self) -> None:
        """Renew the model every `Settings.watch` seconds, without end."""
        while True:
            await asyncio.sleep(self.settings.watch)
            try:
                await self.renew()
            except (PomonaError, RuntimeError, OSError) as error:  # the next try may succeed
                log.warning("the old model stays: %s", error)
            except Exception:
                log.exception("the old model stays")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
