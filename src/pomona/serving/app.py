"""The HTTP application: photos come in, answers go out, nothing is kept.

::

    request ── Gate     host, key, metrics, access log, headers
            ├─ photos   out of the body, within limits (`pomona.serving.uploads`)
            ├─ pool     a bounded queue and a thread for each core (`pomona.serving.worker_pool`)
            └─ answer   JSON, or a problem (`pomona.serving.problem_details`)

A photo that can't be used is a problem if it is the only one of a request, and otherwise a row with
its code, as in the tables. Photos' bytes are held in memory until the answer is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

import anyio.to_thread
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

import pomona
from pomona.core.errors import PomonaError
from pomona.model.recogniser import to_json
from pomona.serving import openapi
from pomona.serving.middleware import PROBLEM, UNKNOWN_HOST, Gate
from pomona.serving.problem_details import Problem, described
from pomona.serving.service import Fetch, Service, Settings
from pomona.serving.worker_pool import MOST_TOP, Loaded, Row
from pomona.web.page import HEADERS, File

__all__ = ["Settings", "create"]

PREDICT, FEATURES, MODEL, RELOAD = "/v1/predict", "/v1/features", "/v1/model", "/v1/reload"
ROUTES = {PREDICT, FEATURES, MODEL, RELOAD, "/healthz", "/readyz", "/metrics", "/openapi.json"}
OPEN = {"/healthz", "/readyz", "/openapi.json"}
"""Routes that need no key, as the page's own files do."""

Top = Annotated[int, Query(ge=1, le=MOST_TOP, description="Labels to name for each photo.")]


def create(fetch: Fetch, settings: Settings | None = None) -> FastAPI:
    """Load a model with ``fetch`` and make the application around it.

    Raises
    ------
    PomonaError
        If there is no model, or no such device.
    """
    settings = settings or Settings()
    service = Service(fetch, settings)
    app = FastAPI(
        title="Pomona",
        summary="What fruit is on a photo?",
        version=pomona.__version__,
        docs_url=None,  # FastAPI's pages load scripts from another host
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lambda _: _lifespan(service),
        responses={
            401: described(401, {"unauthorized": "Send a key."}),
            421: described(421, {"unknown_host": UNKNOWN_HOST}),
        },
    )
    app.state.service = service
    app.openapi = lambda: openapi.document(app, keys=bool(settings.keys))  # type: ignore[method-assign]
    for kind in (Problem, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _handle)
    _add_photo_routes(app, service)
    _add_model_routes(app, service)
    _add_operator_routes(app, service)
    _add_page(app, service)
    _add_middleware(app, service)
    return app


def _add_middleware(app: FastAPI, service: Service) -> None:
    settings = service.settings
    app.add_middleware(
        Gate,
        metrics=service.metrics,
        keys=settings.keys,
        routes=ROUTES,
        open_routes=OPEN,
        locked={("POST", RELOAD)},
        page=lambda path: _is_guarded(service, path),
        hosts=settings.hosts,
    )
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key"],
            expose_headers=["Retry-After"],
        )


@contextlib.asynccontextmanager
async def _lifespan(service: Service) -> AsyncIterator[None]:
    watching = asyncio.create_task(service.watch()) if service.settings.watch else None
    yield
    if watching:
        watching.cancel()
    await anyio.to_thread.run_sync(service.pool.stop)


# --- errors ------------------------------------------------------------------------------------


async def _handle(request: Request, error: Exception) -> Response:
    problem = _as_problem(error)
    request.scope[PROBLEM] = problem.code  # for the gate, which counts
    return problem.response()


def _as_problem(error: Exception) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestValidationError):
        detail = "; ".join(
            f"{'.'.join(str(part) for part in each['loc'][1:])}: {each['msg']}"
            for each in error.errors()
        )
        return Problem(422, "invalid_request", detail)
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return Problem(404, "not_found", "There is nothing here.", headers)
    if error.status_code == 405:
        detail = f"Use {headers.get('Allow', headers.get('allow', 'another method'))}."
        return Problem(405, "method_not_allowed", detail, headers)
    return Problem(error.status_code, "http", str(error.detail), headers)


# --- routes ------------------------------------------------------------------------------------


def _add_photo_routes(app: FastAPI, service: Service) -> None:
    of_photos: dict[str, Any] = {"openapi_extra": openapi.BODY, "responses": openapi.responses()}

    @app.post(PREDICT, response_model=openapi.Answers, **of_photos)
    async def predict(request: Request, top: Top = 3) -> Response:
        """Tell what is on photos."""
        start = time.perf_counter()
        rows = await service.answer(request, "predict")
        answers = [to_json(row, top) for row, _ in rows]
        return _json({"answers": answers, **_about(rows, start)})

    @app.post(FEATURES, response_model=openapi.AllFeatures, **of_photos)
    async def features(request: Request) -> Response:
        """Return photos' features: 1280 numbers each, as in OUT/features."""
        start = time.perf_counter()
        rows = await service.answer(request, "features")
        return _json({"photos": [row for row, _ in rows], **_about(rows, start)})


def _add_model_routes(app: FastAPI, service: Service) -> None:
    @app.get(MODEL, response_model=openapi.Card)
    async def model() -> Response:
        """Return labels, metrics, and what the model was made from."""
        now = service.model
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
            403: described(403, {"forbidden": "The service has no keys."}),
            409: described(409, {"not_reloaded": "The new model can't be used."}),
        },
    )
    async def reload() -> Response:
        """Take over the model that lies where this one came from. Needs a key."""
        try:
            changed = await service.renew()
        except (PomonaError, RuntimeError, OSError) as error:
            detail = " ".join(str(error).split())
            raise Problem(409, "not_reloaded", f"The old model stays: {detail}") from error
        return _json({"version": service.model.version, "changed": changed})


def _add_operator_routes(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Say that the process is up."""
        return {"status": "up"}

    @app.get("/readyz", responses={503: described(503, {"not_ready": "The check failed."})})
    async def readyz() -> dict[str, str]:
        """Say whether a photo gets an answer: one is sent through the model, at most every 2 s."""
        if not await service.is_ready():
            raise Problem(503, "not_ready", "A photo got no answer.", {"Retry-After": "2"})
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return figures for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _json(value: Any) -> Response:
    return Response(json.dumps(value, ensure_ascii=False), media_type="application/json")


def _about(rows: Sequence[tuple[Row, Loaded]], start: float) -> dict[str, Any]:
    milliseconds = round(1e3 * (time.perf_counter() - start), 2)
    return {"model": {"version": rows[0][1].model.version}, "milliseconds": milliseconds}


# --- the page ----------------------------------------------------------------------------------


def _add_page(app: FastAPI, service: Service) -> None:
    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _file_response(service, Request(scope))(scope, receive, send)

    app.router.default = page  # where no route fits: a catch-all route would hide others' 405


def _find(service: Service, path: str) -> File | None:
    """Return the file of a path. Only names in the list exist: no path leads out of it."""
    return service.site.get(path.removeprefix("/") or "index.html")


def _is_guarded(service: Service, path: str) -> bool | None:
    file = _find(service, path)
    return None if file is None else file.guarded


def _file_response(service: Service, request: Request) -> Response:
    file = _find(service, request.url.path)
    if file is None:
        raise HTTPException(404)
    if request.method not in ("GET", "HEAD"):
        raise HTTPException(405, headers={"Allow": "GET, HEAD"})
    headers = HEADERS | file.headers
    if headers.get("ETag") in request.headers.get("if-none-match", "").split(", "):
        return Response(None, 304, headers)
    if isinstance(file.content, bytes):
        return Response(file.content, headers=headers, media_type=file.media_type)
    return FileResponse(file.content, headers=headers, media_type=file.media_type)
