"""Requests that can't be answered: each gets a problem that says why."""

from __future__ import annotations

import io
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest
from PIL import Image
from starlette.requests import Request

from pomona.core.errors import RequestError
from pomona.core.schema import ERRORS
from pomona.model.artifact import Model
from pomona.serving import uploads, worker_pool
from pomona.serving.app import Settings, create
from pomona.serving.problem_details import Problem
from pomona.serving.server import own_names
from tests.conftest import photo
from tests.service import JPEG, KEY, place, problem_code, running, send, send_form, until


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
    assert problem_code(send(url, content), status) == wanted
    assert wanted in ERRORS
    assert send(url, photo(1)).status_code == 200


def test_bodies_of_the_wrong_kind(url: str) -> None:
    for kind in ("application/json", "text/html", "application/x-www-form-urlencoded", ""):
        reply = send(url, photo(1), **{"Content-Type": kind})
        assert problem_code(reply, 415) == "unsupported_media_type"
    reply = send(url, photo(1), **{"Content-Encoding": "gzip"})
    assert problem_code(reply, 415) == "unsupported_encoding"
    for kind, body in (
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=x", b"nonsense"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nno name\r\n--x--\r\n"),
    ):
        assert problem_code(send(url, body, **{"Content-Type": kind}), 400) in (
            "malformed",
            "no_photo",
        )
    reply = httpx.post(url + "/v1/predict", files={}, data={"photo": "text"})
    assert problem_code(reply, 415) == "unsupported_media_type"
    body = b'--x\r\nContent-Disposition: form-data; name="photo"\r\n\r\ntext\r\n--x--\r\n'
    reply = send(url, body, **{"Content-Type": "multipart/form-data; boundary=x"})
    assert problem_code(reply, 400) == "no_photo"


def test_a_part_whose_name_is_encoded_is_a_photo(url: str) -> None:
    """``filename*`` alone (RFC 5987); beside it, the plain name counts, and a text is none."""
    for disposition, wanted in (
        ("name=photo; filename*=UTF-8''p%C3%AAche.jpg", 200),
        ("name=photo; FILENAME*=utf-8'fr'a.jpg", 200),
        ("name=photo; filename=a.jpg; filename*=UTF-8''b.jpg", 200),
        ('name="a; filename*=b"', 400),
    ):
        part = f"--x\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode()
        body = part + (photo(1) if wanted == 200 else b"text") + b"\r\n--x--\r\n"
        reply = send(url, body, **{"Content-Type": "multipart/form-data; boundary=x"})
        assert reply.status_code == wanted, (disposition, reply.text)
    many = b"--x\r\nContent-Disposition: form-data; name=p; filename*=UTF-8''a\r\n\r\nx\r\n" * 17
    reply = send(url, many + b"--x--\r\n", **{"Content-Type": "multipart/form-data; boundary=x"})
    assert problem_code(reply, 413) == "too_many_photos"


def test_a_charset_that_starlette_stumbles_over() -> None:
    """Found by fuzz/uploads.py."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"--x--", "more_body": False}

    kind = b"multipart/form-data; boundary=x; charset=a\0"
    request = Request({"type": "http", "headers": [(b"content-type", kind)]}, receive)
    with uploads.Budget(1000).share() as share, pytest.raises(Problem) as raised:
        anyio.run(uploads.photos, request, uploads.Limits(), share)
    assert raised.value.code == "malformed"


def test_a_thousand_parts(url: str) -> None:
    assert problem_code(send_form(url, *[b"x"] * 1000), 413) == "too_many_photos"
    assert send_form(url, *[photo(1)] * 16).status_code == 200


def test_a_body_of_200_mb_is_refused_before_it_is_read(url: str) -> None:
    with socket.create_connection(place(url), 10) as raw:
        raw.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
            b"Content-Length: 200000000\r\n\r\n" + bytes(1000)
        )
        assert raw.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_doesnt_say_its_length_is_cut(url: str, model: Model) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(400):
            sent += 1 << 20
            yield bytes(1 << 20)

    try:
        reply = httpx.post(url + "/v1/predict", content=chunks(), headers=JPEG, timeout=120)
        assert problem_code(reply, 413) == "too_large"
    except httpx.TransportError:  # the connection was cut while it sent
        pass
    assert send(url, photo(1)).status_code == 200


def test_wrong_methods_and_paths(url: str) -> None:
    assert problem_code(httpx.get(url + "/v1/predict"), 405) == "method_not_allowed"
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "NONSENSE"):
        reply = httpx.request(method, url + "/v1/predict")
        assert reply.status_code in (400, 405), method
    assert problem_code(httpx.post(url + "/v1/model"), 405) == "method_not_allowed"
    for path in ("/v2", "/v1/predict/", "/.env", "/static/app.js", "/web/../service.py", "//etc"):
        assert problem_code(httpx.get(url + path), 404) == "not_found"
    for path in ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/runtime/..%2f..%2fservice.py"):
        with socket.create_connection(place(url), 10) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert raw.recv(1000).startswith(b"HTTP/1.1 404 ")


def test_a_form_that_is_cut_off_is_malformed(url: str) -> None:
    start = b'--x\r\nContent-Disposition: form-data; name="photo"; filename="a"\r\n\r\n'
    reply = send(url, start + photo(1), **{"Content-Type": "multipart/form-data; boundary=x"})
    assert problem_code(reply, 400) == "malformed"


def test_pixels_are_limited(model: Model) -> None:
    large = io.BytesIO()
    Image.new("RGB", (1100, 1000)).save(large, "PNG")
    jpeg = io.BytesIO()
    Image.new("RGB", (1100, 1000)).save(jpeg, "JPEG")
    settings = Settings(workers=1, pixels=1_000_000)
    with running(create(lambda: model, settings)) as url:
        assert problem_code(send(url, large.getvalue()), 413) == "too_large"
        assert send(url, jpeg.getvalue()).status_code == 200  # decoded at a fraction


def test_a_photo_that_kills_the_decoder_costs_itself(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pomona.photos import isolation
    from tests.photos.test_isolation import worse

    monkeypatch.setattr(isolation, "_serve", worse)
    monkeypatch.setenv("POMONA_DECODE_SECONDS", "5")
    with running(create(lambda: model, Settings(workers=1, guard="child"))) as url:
        assert send(url, photo(1)).status_code == 200
        assert problem_code(send(url, b"crash"), 422) == "crashed"
        assert send(url, photo(1)).status_code == 200


def test_keys(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    app = create(lambda: model, Settings(keys=("another-key-0123456789", KEY)))
    with running(app) as url:
        for path in ("/v1/model", "/metrics", "/nothing", "/device/device.json"):
            reply = httpx.get(url + path)
            assert problem_code(reply, 401) == "unauthorized", path
            assert reply.headers["www-authenticate"] == "Bearer"
        assert problem_code(send(url, photo(1)), 401) == "unauthorized"
        for wrong in (KEY[:-1], KEY + "x", "ü", "another-key"):
            reply = send(url, photo(1), Authorization=f"Bearer {wrong}".encode("latin-1"))  # type: ignore[arg-type]
            assert problem_code(reply, 401) == "unauthorized"
        assert send(url, photo(1), Authorization=f"Bearer {KEY}").status_code == 200
        assert send(url, photo(1), **{"X-API-Key": KEY}).status_code == 200
        for path in ("/", "/healthz", "/readyz", "/openapi.json", "/app.js", "/config.json"):
            assert httpx.get(url + path).status_code == 200, path
    assert KEY not in caplog.text


OWN = ("localhost", "LocalHost:1", "127.0.0.1:8000", "[::1]:8000", "10.0.0.7", "fruit.example.")
STRANGE = ("evil.example", "evil.example:8000", "localhost.evil.example", "", "[evil]", "1.2.3.4.5")


def test_without_keys_only_its_own_names(model: Model) -> None:
    """A web page that points a name of its own at this machine (DNS rebinding) reads nothing."""
    names = own_names("0.0.0.0", ["Fruit.Example"], ())
    with running(create(lambda: model, Settings(workers=1, hosts=names))) as url:
        for path in ("/v1/model", "/", "/healthz", "/metrics", "/nothing"):
            for name in STRANGE:
                reply = httpx.get(url + path, headers={"Host": name})
                assert problem_code(reply, 421) == "unknown_host", (path, name)
        assert problem_code(send(url, photo(1), Host="evil.example"), 421) == "unknown_host"
        for name in (*OWN, socket.gethostname()):
            assert httpx.get(url + "/v1/model", headers={"Host": name}).status_code == 200, name
        with socket.create_connection(place(url), 60) as raw:  # a browser always names the host
            raw.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 200 ")
        with socket.create_connection(place(url), 60) as raw:
            raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 421 ")
        assert 'code="unknown_host"' in httpx.get(url + "/metrics").text


def test_with_keys_or_on_demand_any_name() -> None:
    """A page that rebinds has no key."""
    assert own_names("0.0.0.0", [], (KEY,)) is None
    assert own_names("0.0.0.0", ["*"], ()) is None
    for wrong in ("https://fruit.example", "fruit.example:8000", "*.example", ""):
        with pytest.raises(RequestError, match="--allow-host is a name"):
            own_names("0.0.0.0", [wrong], ())


def test_a_bug_is_a_500_and_the_others_go_on(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app, run = create(lambda: model, Settings(workers=1)), worker_pool.Loaded.run

    def wrong(self: Any, kind: Any, contents: Any) -> Any:
        if contents[0] == photo(7):
            raise ZeroDivisionError("a secret")
        return run(self, kind, contents)

    monkeypatch.setattr(worker_pool.Loaded, "run", wrong)
    with running(app) as url:
        reply = send(url, photo(7))
        assert problem_code(reply, 500) == "internal_error"
        assert "secret" not in reply.text
        assert reply.headers["x-content-type-options"] == "nosniff"
        until(lambda: "ZeroDivisionError" in caplog.text)
        assert send(url, photo(1)).status_code == 200
        figures = httpx.get(url + "/metrics").text
        assert (
            'pomona_requests_total{method="POST",route="/v1/predict",status="500"} 1.0' in figures
        )
