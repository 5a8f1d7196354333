"""Nothing of a photo or of who asked is kept or told."""

from __future__ import annotations

import io
import logging
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from pomona.model.artifact import Model
from pomona.serving.app import create
from tests.conftest import photo
from tests.service import running, send_form


def test_logs_and_metrics_tell_nothing_of_who_asked(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with running(create(lambda: model)) as url:
        files = {"photo": ("ann smith.jpg", photo(1), "image/jpeg")}
        reply = httpx.post(url + "/v1/predict?top=2&who=ann", files=files)
        assert reply.status_code == 200
        httpx.get(url + "/ann-smith")
        figures = httpx.get(url + "/metrics").text
    lines = [r.getMessage() for r in caplog.records if r.name == "pomona.access"]
    assert lines[0].startswith("POST /v1/predict 200 ")
    assert lines[1].startswith("GET other 404 ")
    ours = "\n".join(r.getMessage() for r in caplog.records if not r.name.startswith("http"))
    for text in (ours, figures):
        assert "ann" not in text.replace("channel", "")
        assert "127.0.0.1" not in text
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
    assert send_form(url, large.getvalue(), photo(1)).status_code == 200
