"""The service over real connections: answers, refusals, load, another model, its end."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from pomona.backbone import extract
from pomona.core.errors import PomonaError, RequestError
from pomona.core.schema import ERRORS
from pomona.model import artifact
from pomona.model.artifact import Model
from pomona.model.recogniser import why
from pomona.serving import app as app_module
from pomona.serving import problem_details, server, uploads, worker_pool
from pomona.serving.app import Settings, create
from pomona.web import page
from tests.conftest import Brake, photo
from tests.service import running, until
from tests.small_model import ABOUT, SIZE, small_head

pytest.importorskip("sklearn")

KEY = "0123456789abcdef-key"
JPEG = {"Content-Type": "image/jpeg"}


@pytest.fixture(scope="module")
def found(features: Any, tmp_path_factory: pytest.TempPathFactory) -> Model:
    from pomona.backbone import weights
    from pomona.backbone.spec import make_spec

    folder = tmp_path_factory.mktemp("served")
    spec = make_spec(weights.load_weights("fruits"), image_size=SIZE, device="cpu")
    artifact.save_model(folder / "model", spec.payload, small_head(features), ABOUT)
    return artifact.load_model(folder / "model")


@pytest.fixture(scope="module")
def url(found: Model) -> Iterator[str]:
    with running(create(lambda: found, Settings(workers=2))) as address:
        yield address


def send(url: str, content: bytes, path: str = "/v1/predict", **headers: str) -> Any:
    return httpx.post(url + path, content=content, headers=JPEG | headers, timeout=120)


def form(url: str, *contents: bytes, path: str = "/v1/predict") -> Any:
    files = [("photo", (f"{n}.jpg", content, "image/jpeg")) for n, content in enumerate(contents)]
    return httpx.post(url + path, files=files, timeout=120)


def code(reply: Any, status: int) -> str:
    """Check that a reply is a problem, and return its code."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == problem_details.MEDIA_TYPE
    told = reply.json()
    assert told["status"] == status
    assert told["detail"]
    assert "Traceback" not in reply.text
    return str(told["code"])


# --- answers -----------------------------------------------------------------------------------


def test_an_answer_is_what_predict_gives(
    url: str, found: Model, tmp_path: Path, command: Any
) -> None:
    """The same photo by HTTP and by the command: the same words, the same numbers."""
    (tmp_path / "a.jpg").write_bytes(photo(1))
    told = send(url, photo(1)).json()
    ended, out, _ = command("predict", tmp_path / "a.jpg", "--model", found.folder, "--json")
    assert ended == 0
    here = json.loads(out)
    assert told["model"] == {"version": found.version}
    assert told["milliseconds"] > 0
    (answer,) = told["answers"]
    assert answer == {name: here[name] for name in answer}
    assert set(here) - set(answer) == {"path", "model"}


def test_several_photos_keep_their_order_and_a_bad_one_is_a_row(url: str) -> None:
    alone = [send(url, photo(n)).json()["answers"][0] for n in (1, 2)]
    told = form(url, photo(1), b"<html>", photo(2), b"").json()["answers"]
    assert [told[0], told[2]] == alone
    assert [row["error"] for row in told] == [None, "not_an_image", None, "empty"]
    assert told[1]["label"] is None
    assert told[1]["nearest"] == []


def test_unknown_says_why(found: Model) -> None:
    app = create(lambda: found, Settings(workers=1))
    loaded = app.state.service.pool.loaded
    strict = replace(loaded.recogniser, threshold=1e9)
    app.state.service.pool.swap(replace(loaded, recogniser=strict))
    with running(app) as url:
        (answer,) = send(url, photo(1)).json()["answers"]
        assert "pomona_unknown_total 1.0" in httpx.get(url + "/metrics").text
    assert answer["unknown"] is True
    assert answer["label"] is None
    assert answer["reason"] == why("distance")
    assert answer["nearest"][0]["probability"] == answer["probability"]


def test_top(url: str) -> None:
    for top, labels in ((1, 1), (2, 2), (20, 3)):
        told = send(url, photo(1), f"/v1/predict?top={top}").json()
        assert len(told["answers"][0]["nearest"]) == labels
    for wrong in ("0", "21", "x", "-1"):
        assert code(send(url, photo(1), f"/v1/predict?top={wrong}"), 422) == "invalid_request"


def test_features_are_the_tables(url: str, found: Model) -> None:
    import pyarrow as pa

    (row,) = send(url, photo(3, (120, 90)), "/v1/features").json()["photos"]
    batch = pa.record_batch({"content": pa.array([photo(3, (120, 90))], pa.binary())})
    wanted = next(extract.extract(iter([batch]), found.spec(("features",))))
    assert row["features"] == wanted["features"][0].as_py()
    assert (row["width"], row["height"], row["error"]) == (120, 90, None)


def test_the_card(url: str, found: Model) -> None:
    told = httpx.get(url + "/v1/model").json()
    assert told["labels"] == ["a", "b", "ünknown"]
    assert told["version"] == found.version
    assert told["card"] == found.about


# --- bad input ---------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and has hardly any bytes: a bomb."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.mark.parametrize(
    ("content", "status", "wanted"),
    [
        (b"", 400, "empty"),
        (b"<!doctype html><title>x</title>", 415, "not_an_image"),
        (SVG, 415, "not_an_image"),
        (os.urandom(5000), 415, "not_an_image"),
        (photo(1)[:300], 422, "truncated"),
        (png(20_000, 20_000), 413, "too_large"),
        (png(4_000_000, 4_000_000), 413, "too_large"),
        (png(3000, 3000), 422, "truncated"),
    ],
)
def test_a_bad_photo_is_a_problem(url: str, content: bytes, status: int, wanted: str) -> None:
    assert code(send(url, content), status) == wanted
    assert wanted in ERRORS
    assert send(url, photo(1)).status_code == 200


def test_odd_photos_are_answered_as_in_the_tables(url: str) -> None:
    """One pixel, and the first frame of an animation."""
    dot, film = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (1, 1), "red").save(dot, "PNG")
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue")]
    frames[0].save(film, "GIF", save_all=True, append_images=frames[1:])
    still = io.BytesIO()
    frames[0].save(still, "GIF")
    for odd in (dot, film):
        assert send(url, odd.getvalue()).json()["answers"][0]["error"] is None
    first = send(url, film.getvalue()).json()["answers"]
    assert first == send(url, still.getvalue()).json()["answers"]


def test_bodies_of_the_wrong_kind(url: str) -> None:
    for kind in ("application/json", "text/html", "application/x-www-form-urlencoded", ""):
        reply = send(url, photo(1), **{"Content-Type": kind})
        assert code(reply, 415) == "unsupported_media_type"
    reply = send(url, photo(1), **{"Content-Encoding": "gzip"})
    assert code(reply, 415) == "unsupported_encoding"
    for kind, body in (
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=x", b"nonsense"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nno name\r\n--x--\r\n"),
    ):
        assert code(send(url, body, **{"Content-Type": kind}), 400) in ("malformed", "no_photo")
    reply = httpx.post(url + "/v1/predict", files={}, data={"photo": "text"})
    assert code(reply, 415) == "unsupported_media_type"
    body = b'--x\r\nContent-Disposition: form-data; name="photo"\r\n\r\ntext\r\n--x--\r\n'
    reply = send(url, body, **{"Content-Type": "multipart/form-data; boundary=x"})
    assert code(reply, 400) == "no_photo"


def test_a_thousand_parts(url: str) -> None:
    assert code(form(url, *[b"x"] * 1000), 413) == "too_many_photos"
    assert form(url, *[photo(1)] * 16).status_code == 200


def test_a_body_of_200_mb_is_refused_before_it_is_read(url: str) -> None:
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 10) as raw:
        raw.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
            b"Content-Length: 200000000\r\n\r\n" + bytes(1000)
        )
        assert raw.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_doesnt_say_its_length_is_cut(url: str, found: Model) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(400):
            sent += 1 << 20
            yield bytes(1 << 20)

    try:
        reply = httpx.post(url + "/v1/predict", content=chunks(), headers=JPEG, timeout=120)
        assert code(reply, 413) == "too_large"
    except httpx.TransportError:  # the connection was cut while it sent
        pass
    assert send(url, photo(1)).status_code == 200


def test_wrong_methods_and_paths(url: str) -> None:
    assert code(httpx.get(url + "/v1/predict"), 405) == "method_not_allowed"
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "NONSENSE"):
        reply = httpx.request(method, url + "/v1/predict")
        assert reply.status_code in (400, 405), method
    assert code(httpx.post(url + "/v1/model"), 405) == "method_not_allowed"
    for path in ("/v2", "/v1/predict/", "/.env", "/static/app.js", "/web/../service.py", "//etc"):
        assert code(httpx.get(url + path), 404) == "not_found"
    for path in ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/runtime/..%2f..%2fservice.py"):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 10) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert raw.recv(1000).startswith(b"HTTP/1.1 404 ")


def test_slow_clients_are_cut(found: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(server, "REST_SECONDS", 0.5)
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(server, "STUCK_SECONDS", 0.5)
    limits = uploads.Limits(seconds=1.5, stall=0.5, body=100_000)
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
    with running(create(lambda: found, Settings(workers=1, limits=limits))) as url:
        where = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(where, 10) as raw:  # says nothing
            assert raw.recv(1) == b""
        with socket.create_connection(where, 10) as raw:  # never ends its head
            raw.sendall(head)
            with pytest.raises(OSError):
                for _ in range(100):
                    raw.sendall(b"X-Padding: x\r\n")
                    time.sleep(0.05)
        for pause in (2.0, 0.3):  # nothing comes; or a byte now and then
            with socket.create_connection(where, 10) as raw:
                raw.sendall(head + b"Content-Length: 50000\r\n\r\nabc")
                raw.settimeout(pause)
                told = b""
                for _ in range(20):
                    try:
                        told = raw.recv(1000)
                        break
                    except TimeoutError:
                        raw.sendall(b"x")
                assert told.startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(where, 10) as raw:  # an empty line is no request
            raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert raw.recv(1000).startswith(b"HTTP/1.1 200 ")
            raw.sendall(b"\r\n")
            assert raw.recv(1) == b""
        with socket.create_connection(where, 10) as raw:  # sent what was refused, and stays
            raw.sendall(head + b"Content-Encoding: gzip\r\nContent-Length: 5000\r\n\r\n")
            assert raw.recv(1000).startswith(b"HTTP/1.1 415 ")
            raw.sendall(bytes(5000))
            assert raw.recv(1) == b""
        with socket.create_connection(where, 10) as raw:  # trailers
            raw.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n")
            with pytest.raises(OSError):
                for _ in range(200):
                    raw.sendall(b"X: " + bytes(1000).replace(b"\0", b"x") + b"\r\n")
                    time.sleep(0.02)
        with socket.create_connection(where, 10) as raw:  # goes on sending what was refused
            raw.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
            with pytest.raises(OSError):
                for _ in range(200):
                    raw.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                    time.sleep(0.02)
        with socket.create_connection(where, 10) as raw, pytest.raises(OSError):
            for _ in range(2000):  # a head without end
                raw.sendall(b"X" * 1000)
                time.sleep(0.0005)
        assert send(url, photo(1)).status_code == 200


@contextlib.contextmanager
def large_file_asked_for(found: Model, size: int) -> Iterator[socket.socket]:
    """A connection with a small buffer, on which a file of so many bytes is to come."""
    app = create(lambda: found, Settings(workers=1))
    large = page.File(bytes(size), "application/octet-stream")
    app.state.service.site = app.state.service.site | {"large.bin": large}
    with running(app) as url, socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(10)
        raw.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        raw.sendall(b"GET /large.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        yield raw


def test_a_client_that_doesnt_read_is_cut(found: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STUCK_SECONDS", 0.5)
    with large_file_asked_for(found, 30 << 20) as raw:
        time.sleep(2)
        got = 0
        while more := raw.recv(1 << 16):
            got += len(more)
    assert got < 20 << 20


def test_a_client_that_reads_slowly_gets_all(found: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STUCK_SECONDS", 2.0)
    with large_file_asked_for(found, 12 << 20) as raw:
        got, pause = 0, time.monotonic()
        while more := raw.recv(1 << 16):
            got += len(more)
            if got > (12 << 20) * (time.monotonic() - pause) / 5:  # longer than the limit
                time.sleep(0.05)
    assert got > 12 << 20


def test_trailers_are_not_kept() -> None:
    """They come after the body, and would be added to the headers without end."""
    protocol = server._Protocol.__new__(server._Protocol)
    protocol.headers, protocol.expect_100_continue = [], False
    protocol.on_header(b"a", b"1")
    protocol._body = True
    protocol.on_header(b"b", b"2")
    assert protocol.headers == [(b"a", b"1")]


def test_a_client_of_http_2_gets_its_answer(url: str) -> None:
    """It asks for an upgrade first, which a server may ignore."""
    asks = {"Upgrade": "h2c", "Connection": "Upgrade, HTTP2-Settings", "HTTP2-Settings": "AAMA"}
    assert send(url, photo(1), **asks).status_code == 200


def test_what_is_no_http_is_a_problem(url: str) -> None:
    for wrong in (
        b"nonsense\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 10) as raw:
            raw.sendall(wrong)
            told = b""
            while more := raw.recv(4096):
                told += more
        head, _, body = told.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert problem_details.MEDIA_TYPE.encode() in head
        assert json.loads(body)["code"] == "malformed"


def test_a_form_that_is_cut_off_is_malformed(url: str) -> None:
    start = b'--x\r\nContent-Disposition: form-data; name="photo"; filename="a"\r\n\r\n'
    reply = send(url, start + photo(1), **{"Content-Type": "multipart/form-data; boundary=x"})
    assert code(reply, 400) == "malformed"


def test_pixels_are_limited(found: Model) -> None:
    large = io.BytesIO()
    Image.new("RGB", (1100, 1000)).save(large, "PNG")
    jpeg = io.BytesIO()
    Image.new("RGB", (1100, 1000)).save(jpeg, "JPEG")
    settings = Settings(workers=1, pixels=1_000_000)
    with running(create(lambda: found, settings)) as url:
        assert code(send(url, large.getvalue()), 413) == "too_large"
        assert send(url, jpeg.getvalue()).status_code == 200  # decoded at a fraction


# --- load --------------------------------------------------------------------------------------


def test_a_full_queue_refuses_at_once(found: Model, brake: Brake) -> None:
    app = create(lambda: found, Settings(workers=1, queue=3))
    waiting = app.state.service.pool
    with running(app) as url, ThreadPoolExecutor(8) as clients:
        replies = [clients.submit(send, url, photo(0))]
        until(lambda: photo(0) in brake.begun)
        replies += [clients.submit(send, url, photo(n)) for n in range(1, 4)]
        until(lambda: waiting.waiting == 3)
        start = time.monotonic()
        reply = send(url, photo(9))
        assert time.monotonic() - start < 5
        assert code(reply, 503) == "overloaded"
        assert int(reply.headers["retry-after"]) >= 1
        brake.go.set()
        assert [r.result().status_code for r in replies] == [200] * 4
        assert send(url, photo(9)).status_code == 200
        figures = httpx.get(url + "/metrics").text
        assert 'pomona_rejected_total{code="overloaded"} 1.0' in figures
        assert form(url, *[photo(n) for n in range(4)]).status_code == 503  # never has places
        assert app.state.service.budget.used == 0


def test_bytes_are_bounded_too(found: Model, brake: Brake) -> None:
    app = create(lambda: found, Settings(workers=1))
    app.state.service.budget.limit = 3 * len(photo(0))
    with running(app) as url, ThreadPoolExecutor(8) as clients:
        held = [clients.submit(send, url, photo(0)) for _ in range(2)]
        until(lambda: app.state.service.budget.used == 2 * len(photo(0)))
        assert code(send(url, photo(0) + bytes(2000)), 503) == "overloaded"
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


def test_a_client_that_goes_costs_nothing(found: Model, brake: Brake) -> None:
    app = create(lambda: found, Settings(workers=1, queue=2))
    with running(app) as url, ThreadPoolExecutor(8) as clients:
        first = clients.submit(send, url, photo(0))
        until(lambda: photo(0) in brake.begun)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + "/v1/predict", content=photo(1), headers=JPEG, timeout=0.3)
        until(lambda: app.state.service.budget.used == len(photo(0)))
        assert not app.state.service.pool._jobs  # neither its place is taken nor its bytes are held
        others = [clients.submit(send, url, photo(n)) for n in (2, 3)]  # its place is free again
        until(lambda: app.state.service.budget.used == sum(len(photo(n)) for n in (0, 2, 3)))
        brake.go.set()
        assert [r.result().status_code for r in (first, *others)] == [200] * 3
        assert photo(1) not in brake.begun


def test_a_bug_is_a_500_and_the_others_go_on(
    found: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app, run = create(lambda: found, Settings(workers=1)), worker_pool.Loaded.run

    def wrong(self: Any, kind: Any, contents: Any) -> Any:
        if contents[0] == photo(7):
            raise ZeroDivisionError("a secret")
        return run(self, kind, contents)

    monkeypatch.setattr(worker_pool.Loaded, "run", wrong)
    with running(app) as url:
        reply = send(url, photo(7))
        assert code(reply, 500) == "internal_error"
        assert "secret" not in reply.text
        assert reply.headers["x-content-type-options"] == "nosniff"
        until(lambda: "ZeroDivisionError" in caplog.text)
        assert send(url, photo(1)).status_code == 200
        figures = httpx.get(url + "/metrics").text
        assert (
            'pomona_requests_total{method="POST",route="/v1/predict",status="500"} 1.0' in figures
        )


def test_what_waits_is_batched_on_a_gpu(found: Model, brake: Brake) -> None:
    """The pool's way on a GPU, on a CPU: all that wait go together, each gets its own row."""
    loaded = worker_pool.load(found)
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


# --- keys, readiness, another model ------------------------------------------------------------


def test_keys(found: Model, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    app = create(lambda: found, Settings(keys=("another-key-0123456789", KEY)))
    with running(app) as url:
        for path in ("/v1/model", "/metrics", "/nothing", "/device/device.json"):
            reply = httpx.get(url + path)
            assert code(reply, 401) == "unauthorized", path
            assert reply.headers["www-authenticate"] == "Bearer"
        assert code(send(url, photo(1)), 401) == "unauthorized"
        for wrong in (KEY[:-1], KEY + "x", "ü", "another-key"):
            reply = send(url, photo(1), Authorization=f"Bearer {wrong}".encode("latin-1"))  # type: ignore[arg-type]
            assert code(reply, 401) == "unauthorized"
        assert send(url, photo(1), Authorization=f"Bearer {KEY}").status_code == 200
        assert send(url, photo(1), **{"X-API-Key": KEY}).status_code == 200
        for path in ("/", "/healthz", "/readyz", "/openapi.json", "/app.js", "/config.json"):
            assert httpx.get(url + path).status_code == 200, path
    assert KEY not in caplog.text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "fruits.example"])
def test_the_network_is_refused_without_a_key(host: str) -> None:
    with pytest.raises(RequestError, match="POMONA_API_KEYS"):
        server.check_access(host, (), public=False)
    server.check_access(host, (KEY,), public=False)
    server.check_access(host, (), public=True)


def test_keys_that_are_no_secret_are_refused() -> None:
    for weak in ("x", "üüüüüüüüüüüüüüüüüüüüüü", "0123456789abcde"):
        with pytest.raises(RequestError, match="at least 16"):
            server.check_access("127.0.0.1", (weak,), public=False)
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        server.check_access(host, (), public=False)


def test_ready_means_that_a_photo_gets_an_answer(
    found: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "FRESH", 0.0)
    monkeypatch.setattr(app_module, "CHECK", 1.0)
    app, run = create(lambda: found, Settings(workers=1)), worker_pool.Loaded.run
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
        assert code(httpx.get(url + "/readyz"), 503) == "not_ready"
        assert httpx.get(url + "/healthz").json() == {"status": "up"}
        stuck.set()
        until(lambda: httpx.get(url + "/readyz").status_code == 200)


@pytest.fixture
def two(found: Model, features: Any, tmp_path: Path) -> list[Model]:
    """The model, and another one that judges differently."""
    from pomona.backbone import weights
    from pomona.backbone.spec import make_spec

    spec = make_spec(weights.load_weights("random:1"), image_size=SIZE, device="cpu")
    artifact.save_model(
        tmp_path / "other", spec.payload, small_head(features[:, ::-1].copy()), ABOUT
    )
    return [found, artifact.load_model(tmp_path / "other")]


def test_another_model_takes_over_without_a_failed_request(two: list[Model]) -> None:
    now = [two[0]]
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
            "version": two[0].version,
            "changed": False,
        }
        now[0] = two[1]
        reply = httpx.post(url + "/v1/reload", headers=auth)
        assert reply.json() == {"version": two[1].version, "changed": True}
        count = len(seen)
        until(lambda: len(seen) > count + 20)
        stop.set()
        for each in asking:
            each.result()
        assert {status for status, _ in seen} == {200}
        assert [version for _, version in seen[-3:]] == [two[1].version] * 3
        assert f'pomona_model_info{{version="{two[1].version}"}} 1.0' in (
            httpx.get(url + "/metrics", headers=auth).text
        )


def test_a_model_that_cant_be_used_is_not_taken(found: Model) -> None:
    state: list[Any] = [found]

    def fetch() -> Model:
        if isinstance(state[0], Exception):
            raise state[0]
        return state[0]  # type: ignore[no-any-return]

    app = create(fetch, Settings(keys=(KEY,)))
    with running(app) as url:
        state[0] = PomonaError("model.onnx was changed\nor damaged")
        reply = httpx.post(url + "/v1/reload", headers={"X-API-Key": KEY})
        assert code(reply, 409) == "not_reloaded"
        assert reply.json()["detail"] == "The old model stays: model.onnx was changed or damaged"
        assert send(url, photo(1), **{"X-API-Key": KEY}).status_code == 200
        assert httpx.get(url + "/v1/reload", headers={"X-API-Key": KEY}).status_code == 405


def test_reload_needs_a_key_even_where_nothing_else_does(url: str) -> None:
    assert code(httpx.post(url + "/v1/reload"), 403) == "forbidden"


def test_watch_takes_a_new_model_over(two: list[Model]) -> None:
    now: list[Any] = [two[0]]

    def fetch() -> Model:
        if now[0] is None:
            raise PomonaError("it is being written")
        return now[0]  # type: ignore[no-any-return]

    app = create(fetch, Settings(watch=0.1))
    with running(app) as url:
        now[0] = None
        time.sleep(0.3)
        now[0] = two[1]
        until(lambda: httpx.get(url + "/v1/model").json()["version"] == two[1].version)


# --- what is told of whom ----------------------------------------------------------------------


def test_logs_and_metrics_tell_nothing_of_who_asked(
    found: Model, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with running(create(lambda: found)) as url:
        files = {"photo": ("ann smith.jpg", photo(1), "image/jpeg")}
        reply = httpx.post(url + "/v1/predict?top=2&who=ann", files=files)
        assert reply.status_code == 200
        httpx.get(url + "/ann-smith")
        figures = httpx.get(url + "/metrics").text
    lines = [r.getMessage() for r in caplog.records if r.name == "pomona.access"]
    assert lines[0].startswith("POST /v1/predict 200 ")
    assert lines[1].startswith("GET other 404 ")
    ours = "\n".join(r.getMessage() for r in caplog.records if not r.name.startswith("http"))
    for told in (ours, figures):
        assert "ann" not in told.replace("channel", "")
        assert "127.0.0.1" not in told
    assert 'pomona_request_seconds_count{route="/v1/predict"} 1.0' in figures
    assert "pomona_queue_photos 0.0" in figures
    assert "process_resident_memory_bytes" in figures


def test_photos_stay_in_memory(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file of a form would be spooled to disk by the framework's own parser."""
    import tempfile

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a temporary file was opened")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", refused)
    large = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), np.uint8)
    Image.fromarray(noise).save(large, "PNG")
    assert len(large.getvalue()) > 4 << 20
    assert form(url, large.getvalue(), photo(1)).status_code == 200


def test_other_sites_may_ask_only_if_named(found: Model, url: str) -> None:
    asks = {"Origin": "https://fruits.example", "Access-Control-Request-Method": "POST"}
    reply = httpx.options(url + "/v1/predict", headers=asks)
    assert "access-control-allow-origin" not in reply.headers
    settings = Settings(origins=("https://fruits.example",), keys=(KEY,))
    with running(create(lambda: found, settings)) as other:
        reply = httpx.options(other + "/v1/predict", headers=asks)
        assert reply.headers["access-control-allow-origin"] == "https://fruits.example"
        for headers, status in (({"X-API-Key": KEY}, 200), ({}, 401)):
            told = send(other, photo(1), Origin="https://fruits.example", **headers)
            assert told.status_code == status
            assert told.headers["access-control-allow-origin"] == "https://fruits.example"
        evil = asks | {"Origin": "https://evil.example"}
        reply = httpx.options(other + "/v1/predict", headers=evil)
        assert "access-control-allow-origin" not in reply.headers


# --- the document ------------------------------------------------------------------------------


def test_the_document_tells_what_is_answered(url: str) -> None:
    import jsonschema

    document = httpx.get(url + "/openapi.json").json()
    paths = document["paths"]
    assert set(paths) == {
        *("/v1/predict", "/v1/features", "/v1/model", "/v1/reload"),
        *("/healthz", "/readyz", "/metrics"),
    }

    def schema(path: str, method: str, status: str = "200") -> Any:
        content = paths[path][method]["responses"][status]["content"]
        return {**next(iter(content.values()))["schema"], "components": document["components"]}

    jsonschema.validate(send(url, photo(1)).json(), schema("/v1/predict", "post"))
    jsonschema.validate(form(url, photo(1), b"").json(), schema("/v1/predict", "post"))
    jsonschema.validate(
        form(url, photo(1), b"", path="/v1/features").json(), schema("/v1/features", "post")
    )
    jsonschema.validate(httpx.get(url + "/v1/model").json(), schema("/v1/model", "get"))
    jsonschema.validate(send(url, b"").json(), schema("/v1/predict", "post", "400"))
    answered = paths["/v1/predict"]["post"]["responses"]
    told = {
        code
        for each in answered.values()
        for code in next(iter(each["content"].values())).get("examples", {})
    }
    assert set(ERRORS) <= told
    example = answered["200"]["content"]["application/json"]["example"]
    jsonschema.validate(example, schema("/v1/predict", "post"))


def test_no_request_ends_in_a_5xx(url: str) -> None:
    """schemathesis makes requests from the document, and some that don't fit it."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    quick = settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    tried = 0
    for each in schemathesis.openapi.from_url(url + "/openapi.json").get_all_operations():
        operation = each.ok()
        for mode in schemathesis.GenerationMode:
            if mode is schemathesis.GenerationMode.NEGATIVE and not operation.body:
                continue  # there is nothing to get wrong

            @quick
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                nonlocal tried
                reply = case.call()
                assert reply.status_code < 500, (case, reply.text)
                tried += 1

            check()
    assert tried > 50


# --- the command -------------------------------------------------------------------------------


def test_the_command_answers_and_ends_calmly(found: Model, tmp_path: Path) -> None:
    """A real process: SIGTERM while a photo is on its way; it gets its answer, then the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pomona", "serve", "--model", str(found.folder)]
    with subprocess.Popen(
        [*command, "--port", str(port), "--isolate"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"POMONA_API_KEYS": f"{KEY}, second-key-0123456789"},
    ) as process:
        try:
            assert process.stderr is not None
            told = process.stderr.readline() + process.stderr.readline()
            assert f"model {found.version}" in told
            assert f"http://127.0.0.1:{port}" in told
            assert KEY not in told
            body = photo(1)
            with socket.create_connection(("127.0.0.1", port), 20) as raw:
                raw.sendall(
                    b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
                    + f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                    + body[:100]
                )
                time.sleep(0.3)
                process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
                raw.sendall(body[100:])
                assert raw.recv(10_000).startswith(b"HTTP/1.1 200 ")
            assert process.wait(30) == 0
            rest = process.stderr.read()
            assert "Traceback" not in rest
            assert KEY not in rest
        finally:
            process.kill()


def test_wrong_options_are_one_line(found: Model, tmp_path: Path, command: Any) -> None:
    for wrong, rule in (
        (("--host", "0.0.0.0"), "POMONA_API_KEYS"),
        (("--port", "99999"), "--port"),
        (("--queue", "0"), "at least 1"),
        (("--api-key", "short"), "at least 16"),
    ):
        ended, _, told = command("serve", "--model", found.folder, *wrong)
        assert ended == 2
        assert rule in told
        assert len(told.strip().splitlines()) == 1
    ended, _, told = command("serve", "--model", tmp_path, "--port", 0)
    assert ended == 2
    assert "there is no model" in told
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended, _, told = command("serve", "--model", found.folder, "--port", port)
    assert ended == 2
    assert "take another port" in told


def test_a_photo_that_kills_the_decoder_costs_itself(
    found: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pomona.photos import isolation
    from tests.photos.test_isolation import worse

    monkeypatch.setattr(isolation, "_serve", worse)
    monkeypatch.setenv("POMONA_DECODE_SECONDS", "5")
    with running(create(lambda: found, Settings(workers=1, guard="child"))) as url:
        assert send(url, photo(1)).status_code == 200
        assert code(send(url, b"crash"), 422) == "crashed"
        assert send(url, photo(1)).status_code == 200
