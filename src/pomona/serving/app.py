"""The HTTP application: photos come in, answers go out, nothing is kept.

::

    request ── Gate     key, metrics, access log, headers
            ├─ photos   out of the body, within limits (`pomona.serving.uploads`)
            ├─ pool     a bounded queue and a thread for each core (`pomona.serving.worker_pool`)
            └─ answer   JSON, or a problem (`pomona.serving.problem_details`)

A photo that can't be used is a problem when it came alone, and a row with its code among others,
as in the tables. The bytes of photos are held in memory until the answer is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import anyio.to_thread
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

import pomona
from pomona.core.cpus import available_cpus
from pomona.core.errors import PomonaError
from pomona.export.phone import page_files
from pomona.model.artifact import Model
from pomona.photos.isolation import Guard
from pomona.serving import openapi, problem_details, prometheus, uploads, worker_pool
from pomona.serving.middleware import PROBLEM, Gate
from pomona.serving.problem_details import Problem
from pomona.serving.uploads import Budget, Limits, overloaded
from pomona.serving.worker_pool import MOST_TOP, FullError, Kind, Loaded, Pool, Row
from pomona.web import page

log = logging.getLogger("pomona.serving.app")

MEMORY = 256 << 20
"""Bytes of photos that are held at a time, over all requests; more where one may be large."""

FRESH = 2.0
"""Seconds for which `/readyz` goes by its last check."""

CHECK = 5.0
"""Seconds in which a check has to get its answer: it goes before all photos that wait."""

Fetch = Callable[[], Model]
"""Where the model is read from, when it is asked for anew."""


@dataclass(frozen=True)
class Settings:
    """How the service answers; see ``pomona serve --help``.

    Attributes
    ----------
    keys
        Who has one of them may ask; none: everybody.
    limits
        Of one request.
    queue
        Photos that may wait; None: 16 for each worker.
    workers
        Threads; None: one for each core.
    watch
        Seconds between looks for another model; 0: none.
    origins
        Web sites whose pages may ask (CORS).
    guard
        ``child``: decode in child processes.
    pixels
        Pixels that may be decoded. Below the tables' limit: a worker takes 8 bytes for each.
    """

    keys: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    queue: int | None = None
    workers: int | None = None
    device: str = "auto"
    watch: float = 0.0
    origins: tuple[str, ...] = ()
    guard: Guard = ""
    pixels: int = 24_000_000


# --- the application ---------------------------------------------------------------------------


@dataclass
class Service:
    """What the routes share."""

    pool: Pool
    settings: Settings
    fetch: Fetch
    budget: Budget
    metrics: prometheus.Metrics
    site: page.Site
    checked: float = 0.0
    healthy: bool = False
    checking: asyncio.Lock = field(default_factory=asyncio.Lock)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)


def create(fetch: Fetch, settings: Settings | None = None) -> FastAPI:
    """Load a model and make the application around it.

    Parameters
    ----------
    fetch
        Reads the model, now and whenever it is asked for anew.

    Raises
    ------
    PomonaError
        If there is no model, or no such device.
    """
    settings = settings or Settings()
    loaded = _load(fetch(), settings)
    one = settings.limits.body
    service = Service(
        Pool(loaded, settings.workers, settings.queue),
        settings,
        fetch,
        Budget(max(MEMORY, 4 * one)),
        prometheus.Metrics(),
        _site(loaded, settings),
    )
    service.metrics.model(loaded.model.version)
    service.metrics.watch_queue(lambda: service.pool.waiting)
    app = FastAPI(
        title="Pomona",
        summary="What fruit is on a photo?",
        version=pomona.__version__,
        docs_url=None,  # FastAPI's pages load scripts from another host
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lambda _: _life(service),
        responses={401: problem_details.described(401, {"unauthorized": "Send a key."})},
    )
    app.state.service = service
    app.openapi = lambda: openapi.document(app, keys=bool(settings.keys))  # type: ignore[method-assign]
    _handle_errors(app)
    _add_routes(app, service)
    app.add_middleware(
        Gate,
        metrics=service.metrics,
        keys=settings.keys,
        routes=ROUTES,
        open_routes=OPEN,
        locked={("POST", RELOAD)},
        page=lambda path: _is_guarded(service, path),
    )
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key"],
            expose_headers=["Retry-After"],
        )
    return app


def _load(found: Model, settings: Settings) -> Loaded:
    return worker_pool.load(
        found,
        device=settings.device,
        threads=settings.workers or available_cpus(),
        guard=settings.guard,
        pixels=settings.pixels,
    )


def _site(loaded: Loaded, settings: Settings) -> page.Site:
    return page_files(loaded.model, service=True, needs_key=bool(settings.keys))


@contextlib.asynccontextmanager
async def _life(service: Service) -> AsyncIterator[None]:
    watching = asyncio.create_task(_watch(service)) if service.settings.watch else None
    yield
    if watching:
        watching.cancel()
    await anyio.to_thread.run_sync(service.pool.stop)


# --- errors ------------------------------------------------------------------------------------


def _handle_errors(app: FastAPI) -> None:
    async def handle(request: Request, error: Exception) -> Response:
        problem = _as_problem(error)
        request.scope[PROBLEM] = problem.code  # for the gate, which counts
        return problem.response()

    for kind in (Problem, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, handle)


def _as_problem(error: Exception) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestValidationError):
        found = "; ".join(
            f"{'.'.join(str(part) for part in each['loc'][1:])}: {each['msg']}"
            for each in error.errors()
        )
        return Problem(422, "invalid_request", found)
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return Problem(404, "not_found", "There is nothing here.", headers)
    if error.status_code == 405:
        detail = f"Use {headers.get('Allow', headers.get('allow', 'another method'))}."
        return Problem(405, "method_not_allowed", detail, headers)
    return Problem(error.status_code, "http", str(error.detail), headers)


# --- routes ------------------------------------------------------------------------------------

PREDICT, FEATURES, MODEL, RELOAD = "/v1/predict", "/v1/features", "/v1/model", "/v1/reload"
ROUTES = {PREDICT, FEATURES, MODEL, RELOAD, "/healthz", "/readyz", "/metrics", "/openapi.json"}
OPEN = {"/healthz", "/readyz", "/openapi.json"}
"""What needs no key, beside the page."""

Top = Annotated[int, Query(ge=1, le=MOST_TOP, description="Labels to name for each photo.")]


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        PREDICT,
        openapi_extra=openapi.BODY,
        responses=openapi.responses(),
        response_model=openapi.Answers,
    )
    async def predict(request: Request, top: Top = 3) -> Response:
        """Tell what is on photos."""
        start = time.perf_counter()
        found = await _answered(service, request, "predict")
        told = [_told(row, top) for row, _ in found]
        return _json({"answers": told, **_about(found, start)})

    @app.post(
        FEATURES,
        openapi_extra=openapi.BODY,
        responses=openapi.responses(),
        response_model=openapi.AllFeatures,
    )
    async def features(request: Request) -> Response:
        """Return photos' features: 1280 numbers each, as in OUT/features."""
        start = time.perf_counter()
        found = await _answered(service, request, "features")
        return _json({"photos": [row for row, _ in found], **_about(found, start)})

    @app.get(MODEL, response_model=openapi.Card)
    async def model() -> Response:
        """Return labels, metrics, and what the model was made from."""
        now = service.pool.loaded.model
        return _json(
            {
                "version": now.version,
                "labels": now.labels,
                "metrics": now.about.get("metrics", {}),
                "card": now.about,
            }
        )

    @app.post(
        RELOAD,
        response_model=openapi.Reloaded,
        responses={
            403: problem_details.described(403, {"forbidden": "The service has no keys."}),
            409: problem_details.described(409, {"not_reloaded": "The new model can't be used."}),
        },
    )
    async def reload() -> Response:
        """Take over the model that lies where this one came from. Needs a key."""
        try:
            changed = await _renew(service)
        except (PomonaError, RuntimeError, OSError) as error:
            detail = " ".join(str(error).split())
            raise Problem(409, "not_reloaded", f"The old model stays: {detail}") from error
        return _json({"version": service.pool.loaded.model.version, "changed": changed})

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Say that the process is up."""
        return {"status": "up"}

    @app.get(
        "/readyz",
        responses={503: problem_details.described(503, {"not_ready": "The check failed."})},
    )
    async def readyz() -> dict[str, str]:
        """Say whether a photo gets an answer: one is sent through the model, at most every 2 s."""
        if not await _is_ready(service):
            raise Problem(503, "not_ready", "A photo got no answer.", {"Retry-After": "2"})
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return figures for Prometheus."""
        return Response(service.metrics.text(), media_type=prometheus.MEDIA_TYPE)

    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _file(service, Request(scope))(scope, receive, send)

    app.router.default = page  # where no route fits: a catch-all would hide a 405 of theirs


def _json(value: Any) -> Response:
    return Response(json.dumps(value, ensure_ascii=False), media_type="application/json")


def _about(found: Sequence[tuple[Row, Loaded]], start: float) -> dict[str, Any]:
    milliseconds = round(1e3 * (time.perf_counter() - start), 2)
    return {"model": {"version": found[0][1].model.version}, "milliseconds": milliseconds}


def _told(row: Row, top: int) -> dict[str, Any]:
    """Return an answer as `pomona predict --json` gives it."""
    pairs = zip(row["nearest"] or (), row["probabilities"] or (), strict=True)
    nearest = [{"label": label, "probability": round(p, 6)} for label, p in list(pairs)[:top]]
    told = {name: row[name] for name in openapi.Answer.model_fields if name != "nearest"}
    for name in ("probability", "score"):
        told[name] = None if row[name] is None else round(row[name], 6)
    return {**told, "nearest": nearest}


async def _answered(service: Service, request: Request, kind: Kind) -> list[tuple[Row, Loaded]]:
    """Read a request's photos, queue them, and wait for their rows."""
    if service.pool.is_full:  # before the body is read: nobody uploads for nothing
        raise overloaded()
    with service.budget.share() as share:
        contents = await uploads.photos(request, service.settings.limits, share)
        try:
            futures = service.pool.submit(kind, contents)
        except FullError:
            raise overloaded() from None
        found = await _while_there(service, request, futures)
    if len(found) == 1 and (code := found[0][0]["error"]):
        raise problem_details.of_photo(code)
    service.metrics.answers(row for row, _ in found)
    return found


async def _while_there(
    service: Service, request: Request, futures: Sequence[Any]
) -> list[tuple[Row, Loaded]]:
    """Wait for futures while the client waits too; if it goes, what hasn't begun is dropped."""
    rows: list[asyncio.Future[Any]] = [asyncio.wrap_future(future) for future in futures]
    gone: asyncio.Future[Any] = asyncio.ensure_future(_gone(request))
    try:
        pending = {*rows, gone}
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
        if sum(future.cancel() for future in futures):  # what hasn't begun
            service.pool.drop_cancelled()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- the page ----------------------------------------------------------------------------------


def _find(service: Service, path: str) -> page.File | None:
    """Return the file of a path. Only names in the list exist: there are no paths to climb."""
    return service.site.get(path.removeprefix("/") or "index.html")


def _is_guarded(service: Service, path: str) -> bool | None:
    file = _find(service, path)
    return None if file is None else file.guarded


def _file(service: Service, request: Request) -> Response:
    """Return a file of the page."""
    file = _find(service, request.url.path)
    if file is None:
        raise HTTPException(404)
    if request.method not in ("GET", "HEAD"):
        raise HTTPException(405, headers={"Allow": "GET, HEAD"})
    headers = page.HEADERS | file.headers
    if headers.get("ETag") in request.headers.get("if-none-match", "").split(", "):
        return Response(None, 304, headers)
    if isinstance(file.content, bytes):
        return Response(file.content, headers=headers, media_type=file.media_type)
    return FileResponse(file.content, headers=headers, media_type=file.media_type)


# --- readiness, another model ------------------------------------------------------------------


async def _is_ready(service: Service) -> bool:
    async with service.checking:  # one at a time: checks go before all photos that wait
        if time.monotonic() - service.checked > FRESH:
            service.healthy = await _gets_answer(service)
            service.checked = time.monotonic()
        return service.healthy


async def _gets_answer(service: Service) -> bool:
    try:
        (future,) = service.pool.submit("predict", [worker_pool.sample()], first=True)
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


async def _renew(service: Service) -> bool:
    """Read the model anew, try it, and let it answer. Returns whether it is another one."""
    async with service.changing:
        return await anyio.to_thread.run_sync(_replace, service)


def _replace(service: Service) -> bool:
    found = service.fetch()
    if found.about["digest"] == service.pool.loaded.model.about["digest"]:
        return False
    loaded = _load(found, service.settings)
    site = _site(loaded, service.settings)
    service.pool.swap(loaded)
    service.site = site
    service.metrics.model(found.version)
    log.info("model %s answers now", found.version)
    return True


async def _watch(service: Service) -> None:
    while True:
        await asyncio.sleep(service.settings.watch)
        try:
            await _renew(service)
        except (PomonaError, RuntimeError, OSError) as error:  # the next look may succeed
            log.warning("the old model stays: %s", error)
        except Exception:
            log.exception("the old model stays")
