"""The service's answers are those of `pomona predict` and of the tables."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from pomona.backbone import extract
from pomona.core.schema import ERRORS
from pomona.model.artifact import Model
from pomona.model.recogniser import why
from pomona.serving.app import Settings, create
from tests.conftest import photo
from tests.service import KEY, problem_code, running, send, send_form


def test_an_answer_is_what_predict_gives(
    url: str, model: Model, tmp_path: Path, command: Any
) -> None:
    """The same photo by HTTP and by the command: the same words, the same numbers."""
    (tmp_path / "a.jpg").write_bytes(photo(1))
    reply = send(url, photo(1)).json()
    ended, out, _ = command("predict", tmp_path / "a.jpg", "--model", model.folder, "--json")
    assert ended == 0
    here = json.loads(out)
    assert reply["model"] == {"version": model.version}
    assert reply["milliseconds"] > 0
    (answer,) = reply["answers"]
    assert answer == {name: here[name] for name in answer}
    assert set(here) - set(answer) == {"path", "model"}


def test_several_photos_keep_their_order_and_a_bad_one_is_a_row(url: str) -> None:
    alone = [send(url, photo(n)).json()["answers"][0] for n in (1, 2)]
    reply = send_form(url, photo(1), b"<html>", photo(2), b"").json()["answers"]
    assert [reply[0], reply[2]] == alone
    assert [row["error"] for row in reply] == [None, "not_an_image", None, "empty"]
    assert reply[1]["label"] is None
    assert reply[1]["nearest"] == []


def test_unknown_says_why(model: Model) -> None:
    app = create(lambda: model, Settings(workers=1))
    loaded = app.state.service.pool.loaded
    strict = replace(loaded.recogniser, threshold=1e9)
    app.state.service.pool.loaded = replace(loaded, recogniser=strict)
    with running(app) as url:
        (answer,) = send(url, photo(1)).json()["answers"]
        assert "pomona_unknown_total 1.0" in httpx.get(url + "/metrics").text
    assert answer["unknown"] is True
    assert answer["label"] is None
    assert answer["reason"] == why("distance")
    assert answer["nearest"][0]["probability"] == answer["probability"]


def test_top(url: str) -> None:
    for top, labels in ((1, 1), (2, 2), (20, 3)):
        reply = send(url, photo(1), f"/v1/predict?top={top}").json()
        assert len(reply["answers"][0]["nearest"]) == labels
    for wrong in ("0", "21", "x", "-1"):
        assert (
            problem_code(send(url, photo(1), f"/v1/predict?top={wrong}"), 422) == "invalid_request"
        )


def test_features_are_the_tables(url: str, model: Model) -> None:
    import pyarrow as pa

    (row,) = send(url, photo(3, (120, 90)), "/v1/features").json()["photos"]
    batch = pa.record_batch({"content": pa.array([photo(3, (120, 90))], pa.binary())})
    wanted = next(extract.extract(iter([batch]), model.spec(("features",))))
    assert row["features"] == wanted["features"][0].as_py()
    assert (row["width"], row["height"], row["error"]) == (120, 90, None)


def test_the_card(url: str, model: Model) -> None:
    reply = httpx.get(url + "/v1/model").json()
    assert reply["labels"] == ["a", "b", "ünknown"]
    assert reply["version"] == model.version
    assert reply["card"] == model.about


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


def test_other_sites_may_ask_only_if_named(model: Model, url: str) -> None:
    asks = {"Origin": "https://fruits.example", "Access-Control-Request-Method": "POST"}
    reply = httpx.options(url + "/v1/predict", headers=asks)
    assert "access-control-allow-origin" not in reply.headers
    settings = Settings(origins=("https://fruits.example",), keys=(KEY,))
    with running(create(lambda: model, settings)) as other:
        reply = httpx.options(other + "/v1/predict", headers=asks)
        assert reply.headers["access-control-allow-origin"] == "https://fruits.example"
        for headers, status in (({"X-API-Key": KEY}, 200), ({}, 401)):
            reply = send(other, photo(1), Origin="https://fruits.example", **headers)
            assert reply.status_code == status
            assert reply.headers["access-control-allow-origin"] == "https://fruits.example"
        evil = asks | {"Origin": "https://evil.example"}
        reply = httpx.options(other + "/v1/predict", headers=evil)
        assert "access-control-allow-origin" not in reply.headers


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
    jsonschema.validate(send_form(url, photo(1), b"").json(), schema("/v1/predict", "post"))
    jsonschema.validate(
        send_form(url, photo(1), b"", path="/v1/features").json(), schema("/v1/features", "post")
    )
    jsonschema.validate(httpx.get(url + "/v1/model").json(), schema("/v1/model", "get"))
    jsonschema.validate(send(url, b"").json(), schema("/v1/predict", "post", "400"))
    answered = paths["/v1/predict"]["post"]["responses"]
    reply = {
        code
        for each in answered.values()
        for code in next(iter(each["content"].values())).get("examples", {})
    }
    assert set(ERRORS) <= reply
    example = answered["200"]["content"]["application/json"]["example"]
    jsonschema.validate(example, schema("/v1/predict", "post"))


@pytest.mark.slow
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
