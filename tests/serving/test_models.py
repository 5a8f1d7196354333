"""Readiness, and another model that takes over."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from pomona.core.errors import PomonaError
from pomona.model import signature
from pomona.model.artifact import Model, load_model
from pomona.serving import service as service_module
from pomona.serving import worker_pool
from pomona.serving.app import Settings, create
from tests.broken_models import BROKEN, whole
from tests.conftest import photo
from tests.keys import make_keys
from tests.service import JPEG, KEY, problem_code, running, send, until


def test_ready_means_that_a_photo_gets_an_answer(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "FRESH", 0.0)
    monkeypatch.setattr(service_module, "CHECK", 1.0)
    app, run = create(lambda: model, Settings(workers=1)), worker_pool.Loaded.run
    stuck = threading.Event()

    def hang(self: Any, kind: Any, contents: Any) -> Any:
        if contents[0] == photo(5):
            stuck.wait(300)
        return run(self, kind, contents)

    monkeypatch.setattr(worker_pool.Loaded, "run", hang)
    with running(app) as url, ThreadPoolExecutor(2) as clients:
        until(lambda: httpx.get(url + "/readyz").json() == {"status": "ready"})
        clients.submit(send, url, photo(5))
        until(lambda: app.state.service.budget.used > 0)
        assert problem_code(httpx.get(url + "/readyz"), 503) == "not_ready"
        assert httpx.get(url + "/healthz").json() == {"status": "up"}
        stuck.set()
        until(lambda: httpx.get(url + "/readyz").status_code == 200)


def test_another_model_takes_over_without_a_failed_request(
    model: Model, other_model: Model
) -> None:
    now = [model]
    app = create(lambda: now[0], Settings(keys=(KEY,)))
    auth = {"Authorization": f"Bearer {KEY}"}
    seen: list[tuple[int, str]] = []
    stop = threading.Event()
    with running(app) as url, ThreadPoolExecutor(3) as clients:

        def ask() -> None:
            with httpx.Client() as client:
                while not stop.is_set():
                    reply = client.post(url + "/v1/predict", content=photo(1), headers=JPEG | auth)
                    seen.append((reply.status_code, reply.json()["model"]["version"]))

        asking = [clients.submit(ask) for _ in range(3)]
        until(lambda: len(seen) > 20)
        assert httpx.post(url + "/v1/reload", headers=auth).json() == {
            "version": model.version,
            "changed": False,
        }
        now[0] = other_model
        reply = httpx.post(url + "/v1/reload", headers=auth)
        assert reply.json() == {"version": other_model.version, "changed": True}
        count = len(seen)
        until(lambda: len(seen) > count + 20)
        stop.set()
        for each in asking:
            each.result()
        assert {status for status, _ in seen} == {200}
        assert [version for _, version in seen[-3:]] == [other_model.version] * 3
        assert f'pomona_model_info{{version="{other_model.version}"}} 1.0' in (
            httpx.get(url + "/metrics", headers=auth).text
        )


def test_a_model_that_cant_be_used_is_not_taken(model: Model) -> None:
    state: list[Any] = [model]

    def fetch() -> Model:
        if isinstance(state[0], Exception):
            raise state[0]
        return state[0]  # type: ignore[no-any-return]

    app = create(fetch, Settings(keys=(KEY,)))
    with running(app) as url:
        state[0] = PomonaError("model.onnx was changed\nor damaged")
        reply = httpx.post(url + "/v1/reload", headers={"X-API-Key": KEY})
        assert problem_code(reply, 409) == "not_reloaded"
        assert reply.json()["detail"] == "The old model stays: model.onnx was changed or damaged"
        assert send(url, photo(1), **{"X-API-Key": KEY}).status_code == 200
        assert httpx.get(url + "/v1/reload", headers={"X-API-Key": KEY}).status_code == 405


def test_409_keeps_the_old_model_with_every_kind_of_broken_folder(tmp_path: Path) -> None:
    folder = whole(tmp_path / "model")
    app = create(lambda: load_model(folder), Settings(keys=(KEY,), workers=1))
    auth = {"X-API-Key": KEY}
    with running(app) as url, httpx.Client(headers=auth, timeout=120) as client:
        first = send(url, photo(1), **auth).json()["answers"]
        version = client.get(url + "/v1/model").json()["version"]
        for name, damage in BROKEN.items():
            shutil.rmtree(folder)
            damage(whole(folder))
            reply = client.post(url + "/v1/reload")
            assert problem_code(reply, 409) == "not_reloaded", name
            detail = reply.json()["detail"]
            assert detail.startswith("The old model stays: "), name
            assert str(folder) in detail, name
        assert client.get(url + "/v1/model").json()["version"] == version
        assert send(url, photo(1), **auth).json()["answers"] == first
        shutil.rmtree(folder)
        whole(folder)
        assert client.post(url + "/v1/reload").json() == {"version": version, "changed": False}


def test_409_keeps_the_old_model_without_the_signature_that_is_asked_for(tmp_path: Path) -> None:
    mine, theirs = make_keys(tmp_path, "mine"), make_keys(tmp_path, "theirs")
    folder = whole(tmp_path / "model")
    files = load_model(folder).files
    signature.sign(folder, files, mine.private)
    app = create(lambda: load_model(folder, verify=mine.public), Settings(keys=(KEY,), workers=1))
    auth = {"X-API-Key": KEY}
    with running(app) as url, httpx.Client(headers=auth, timeout=120) as client:
        version = client.get(url + "/v1/model").json()["version"]
        signature.sign(folder, files, theirs.private)
        reply = client.post(url + "/v1/reload")
        assert problem_code(reply, 409) == "not_reloaded"
        assert "is no signature by" in reply.json()["detail"]
        (folder / "model.sig").unlink()
        assert "isn't signed" in client.post(url + "/v1/reload").json()["detail"]
        assert send(url, photo(1), **auth).json()["model"]["version"] == version
        signature.sign(folder, files, mine.private)
        assert client.post(url + "/v1/reload").json() == {"version": version, "changed": False}


def test_reload_needs_a_key_even_where_nothing_else_does(url: str) -> None:
    assert problem_code(httpx.post(url + "/v1/reload"), 403) == "forbidden"


def test_watch_takes_a_new_model_over(model: Model, other_model: Model) -> None:
    now: list[Any] = [model]
    failed = 0

    def fetch() -> Model:
        nonlocal failed
        if now[0] is None:
            failed += 1
            raise PomonaError("it is being written")
        return now[0]  # type: ignore[no-any-return]

    app = create(fetch, Settings(watch=0.1))
    with running(app) as url:
        now[0] = None
        until(lambda: failed > 1)  # it goes on watching
        now[0] = other_model
        until(lambda: httpx.get(url + "/v1/model").json()["version"] == other_model.version)
