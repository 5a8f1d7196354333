"""Load: a full queue, bounded memory, clients that go, costly photos, batches on a GPU."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import pytest

from pomona.model.artifact import Model
from pomona.photos import isolation
from pomona.photos.decoding import decode
from pomona.serving import problem_details, uploads, worker_pool
from pomona.serving.app import Settings, create
from tests.conftest import Brake, photo
from tests.photos import crafted
from tests.service import place, problem_code, running, send, send_form, until


def test_a_full_queue_refuses_at_once(model: Model, brake: Brake) -> None:
    app = create(lambda: model, Settings(workers=1, queue=3))
    waiting = app.state.service.pool
    with running(app) as url, ThreadPoolExecutor(8) as clients:
        replies = [clients.submit(send, url, photo(0))]
        until(lambda: photo(0) in brake.begun)
        replies += [clients.submit(send, url, photo(n)) for n in range(1, 4)]
        until(lambda: waiting.waiting == 3)
        reply = send(url, photo(9))  # the answer comes although the model is held
        assert problem_code(reply, 503) == "overloaded"
        assert int(reply.headers["retry-after"]) >= 1
        brake.go.set()
        assert [r.result().status_code for r in replies] == [200] * 4
        assert send(url, photo(9)).status_code == 200
        figures = httpx.get(url + "/metrics").text
        assert 'pomona_rejected_total{code="overloaded"} 1.0' in figures
        assert send_form(url, *[photo(n) for n in range(4)]).status_code == 503  # never has places
        assert app.state.service.budget.used == 0


def test_bytes_are_bounded_too(model: Model, brake: Brake) -> None:
    app = create(lambda: model, Settings(workers=1))
    app.state.service.budget.limit = 3 * len(photo(0))
    with running(app) as url, ThreadPoolExecutor(8) as clients:
        held = [clients.submit(send, url, photo(0)) for _ in range(2)]
        until(lambda: app.state.service.budget.used == 2 * len(photo(0)))
        assert problem_code(send(url, photo(0) + bytes(2000)), 503) == "overloaded"
        brake.go.set()
        assert [reply.result().status_code for reply in held] == [200, 200]
    assert app.state.service.budget.used == 0


def test_large_bodies_leave_room_for_small_ones() -> None:
    budget = uploads.Budget(8 << 20)
    with budget.share() as large, budget.share() as small:
        large.take(6 << 20)
        with pytest.raises(problem_details.Problem):
            large.take(1)
        small.take(1 << 20)
        with pytest.raises(problem_details.Problem):
            small.take(1)
    assert budget.used == 0


def test_a_client_that_goes_costs_nothing(model: Model, brake: Brake) -> None:
    app = create(lambda: model, Settings(workers=1, queue=2))
    with running(app) as url, ThreadPoolExecutor(8) as clients:
        first = clients.submit(send, url, photo(0))
        until(lambda: photo(0) in brake.begun)
        body = photo(1)
        head = "POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
        with socket.create_connection(place(url), 60) as raw:
            raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: app.state.service.pool.waiting == 1)
        until(lambda: app.state.service.budget.used == len(photo(0)))
        assert not app.state.service.pool._jobs  # neither its place is taken nor its bytes are held
        others = [clients.submit(send, url, photo(n)) for n in (2, 3)]  # its place is free again
        until(lambda: app.state.service.budget.used == sum(len(photo(n)) for n in (0, 2, 3)))
        brake.go.set()
        assert [r.result().status_code for r in (first, *others)] == [200] * 3
        assert photo(1) not in brake.begun


def test_what_waits_is_batched_on_a_gpu(model: Model, brake: Brake) -> None:
    """The pool's way on a GPU, on a CPU: all that wait go together, each gets its own row."""
    loaded = worker_pool.load(model)
    working = worker_pool.Pool(loaded, workers=1)
    working.at_once = 5
    run = worker_pool.Loaded.run
    working.submit("predict", [photo(0)])
    until(lambda: photo(0) in brake.begun)
    futures = working.submit("predict", [photo(n) for n in range(1, 7)])
    mixed = working.submit("features", [photo(1)])
    cancelled = working.submit("predict", [photo(2)])
    cancelled[0].cancel()
    before = len(brake.begun)
    brake.go.set()
    rows = [future.result(30)[0] for future in futures]
    assert len(mixed[0].result(30)[0]["features"]) == 1280
    working.stop()
    assert len(brake.begun) - before == 7
    assert rows == [run(loaded, "predict", [photo(n)])[0] for n in range(1, 7)]
    with pytest.raises(RuntimeError, match="stopped"):
        working.submit("predict", [photo(1)])


COSTLY = crafted.png(4000, 4000, 0)
"""70 KB that take half a second."""


def waits(pipe: Connection) -> None:
    """A child that decodes once it may, as files say."""
    pipe.send(isolation.READY)
    folder = Path(os.environ["POMONA_TEST_FOLDER"])
    while True:
        content, size, most, _ = pipe.recv()
        (folder / "begun").touch()
        until((folder / "go").exists)
        pipe.send(tuple(decode(content, size, most)))


@pytest.fixture
def _child_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_serve", waits)
    monkeypatch.setenv("POMONA_TEST_FOLDER", str(tmp_path))


@pytest.mark.usefixtures("_child_waits")
def test_costly_photos_let_others_pass(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "DECODE_SECONDS", 60.0)
    app = create(lambda: model, Settings(workers=2))
    with running(app) as url, ThreadPoolExecutor(2) as clients:
        costly = [clients.submit(send, url, COSTLY) for _ in range(2)]
        until((tmp_path / "begun").exists)
        until(lambda: app.state.service.pool.waiting == 1)  # one is decoded, the other waits
        assert send(url, photo(1)).status_code == 200
        assert not any(reply.done() for reply in costly)
        (tmp_path / "go").touch()
        assert [reply.result().status_code for reply in costly] == [200, 200]


@pytest.mark.usefixtures("_child_waits")
def test_a_photo_that_takes_too_long_is_ended(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "DECODE_SECONDS", 0.5)
    with running(create(lambda: model, Settings(workers=1))) as url:
        assert problem_code(send(url, COSTLY), 422) == "crashed"
        assert send(url, photo(1)).status_code == 200


def test_photos_that_take_too_long_together(model: Model) -> None:
    with running(create(lambda: model, Settings(workers=1))) as url:
        assert problem_code(send_form(url, *[COSTLY] * 16), 413) == "too_large"
        assert send_form(url, photo(1), COSTLY).status_code == 200
