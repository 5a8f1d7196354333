"""Somebody who looks at the page in a browser, the service that they see, and their photos."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pomona.model.artifact import Model
from pomona.model.recogniser import answer_photos, make_recogniser
from pomona.web.page import missing_runtime
from tests.conftest import browser_lacks

SIZE = 64
LABELS = ("Apple", "Cherry", "Pear", "Plum", "Quince", "Tomato")


def fruit(label: int, number: int = 0) -> bytes:
    """A photo whose label the small model knows: noise of its own colour."""
    rng = np.random.default_rng(1000 * label + number)
    base = np.array([[200, 40, 40], [90, 0, 30], [170, 190, 60], [90, 70, 190], [220, 200, 50],
                     [40, 160, 110]][label])  # fmt: skip
    noise = rng.integers(-30, 31, (12, 12, 3))
    pixels = np.clip(base + noise, 0, 255).astype(np.uint8)
    return encoded(Image.fromarray(pixels).resize((100, 100), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


STRANGE = encoded(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 100, 3)).astype(np.uint8))
)
"""Noise of all colours: no fruit."""


def python_says(model: Model, contents: list[bytes], top: int = 5) -> list[dict[str, Any]]:
    return answer_photos(contents, make_recogniser(model, top=top))


def needs_runtime() -> None:
    """Skip where npm couldn't be asked; where the browser tests are required it has to be there."""
    if missing := missing_runtime():
        browser_lacks(missing)


class Visitor:
    """Somebody who looks at the page. Anything on the console that isn't expected is an error."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 390, "height": 844}} | options)
        self.url = url
        self.console: list[str] = []
        self.asked: list[str] = []
        self.expected: tuple[str, ...] = ("Service Worker registration blocked by Playwright",)
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.open()

    def open(self) -> None:
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.goto(self.url)
        self.until(lambda: self("where") != "")

    def __call__(self, part: str) -> str:
        return str(self.page.locator(f"#{part}").inner_text())

    def until(self, so: Callable[[], bool], seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not so():
            assert time.monotonic() < end, self.page.locator("body").inner_text()
            self.page.wait_for_timeout(20)

    def choose(self, *contents: bytes, name: str = "photo") -> None:
        self.page.set_input_files(
            "#files",
            [
                {"name": f"{name}{n}.jpg", "mimeType": "image/jpeg", "buffer": content}
                for n, content in enumerate(contents)
            ],
        )

    def states(self) -> list[str]:
        return list(
            self.page.evaluate(
                "Array.from(document.querySelectorAll('#strip li'), n => n.className)"
            )
        )

    def settled(self) -> None:
        """Wait until every photo has its answer, and its thumbnail if it can have one."""
        self.until(lambda: not {"waiting", "working"} & set(self.states()))

    def see(self, *contents: bytes) -> str:
        """Choose photos and return what is said of the first."""
        self.choose(*contents)
        self.settled()
        return self("title")

    def on_device(self) -> None:
        self.page.locator("#here").check()
        self.until(lambda: self("where").startswith("Photos stay"))

    def focused(self) -> str:
        return str(
            self.page.evaluate(
                "document.activeElement.getAttribute('aria-label') || document.activeElement.id"
                " || document.activeElement.textContent.trim()"
            )
        )

    def kept(self) -> None:
        """Wait until the service worker has the page."""
        self.page.evaluate("navigator.serviceWorker.ready.then(() => true)")
        self.until(lambda: bool(self.page.evaluate("!!navigator.serviceWorker.controller")))

    def close(self) -> None:
        self.context.close()
        assert [line for line in self.console if not line.startswith(self.expected)] == []


REFUSED = "Failed to load resource: the server responded with a status of"


@dataclass
class Served:
    """A service that runs, and what it was asked for."""

    app: Any
    url: str = ""
    asked: list[str] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope.get("path", ""))
        await self.app(scope, receive, send)


@contextlib.contextmanager
def serve(model: Model, **settings: Any) -> Iterator[Served]:
    service = pytest.importorskip("pomona.serving.app", reason="needs the extra serve")
    from tests.service import running

    served = Served(service.create(lambda: model, service.Settings(workers=1, **settings)))
    with running(served) as url:
        served.url = f"{url.rstrip('/')}/"
        yield served
