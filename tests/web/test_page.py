"""The page in a browser, with the service and as static files."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import io
import json
import os
import random
import re
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pomona.backbone import extract, weights
from pomona.backbone.spec import make_spec
from pomona.core.errors import MissingError, RequestError
from pomona.export import export, quantization
from pomona.export.export import ExportOptions
from pomona.model import artifact, classifier, projection, unknown
from pomona.model.artifact import Model
from pomona.model.head import make_head
from pomona.model.recogniser import make_recogniser, recognise
from pomona.photos import decoding
from pomona.web import page as page_module
from pomona.web.page import (
    HEADERS,
    RUNTIME,
    Site,
    _file,
    _folder,
    _service_worker,
    missing_runtime,
    site,
    write,
)
from tests.conftest import Brake, photo

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[2]
SIZE = 64
LABELS = ("Apple", "Cherry", "Pear", "Plum", "Quince", "Tomato")


def make_model(
    folder: Path, weights_name: str, contents: list[bytes], labels: list[str], size: int
) -> Model:
    """Train on a few photos, without Spark."""
    spec = make_spec(weights.load_weights(weights_name), image_size=size, device="cpu")
    batch = pa.record_batch({"content": pa.array(contents, pa.binary())})
    rows = next(extract.extract(iter([batch]), spec))
    features = np.array(rows["features"].to_pylist(), np.float32)
    moments = projection.Moments.of(projection.raised(features, 0.5))
    found = projection.fit(moments, 10, power=0.5)
    z = found.transform(features)
    names, y = np.unique(labels, return_inverse=True)
    fitted = classifier.fit(z, y, tuple(str(name) for name in names), 1.0)
    detector = unknown.make("distance", z, y)
    scores = detector.score(z, fitted.logits(z))
    detector = replace(detector, threshold=float(np.quantile(scores, 0.05)))
    about = {
        "weights": {
            "name": weights_name,
            "digest": "-",
            "trained": not weights_name.startswith("random:"),
        },
        "preprocessing": {"image_size": size},
    }
    artifact.save_model(folder, spec.payload, make_head(found, fitted, detector), about)
    return artifact.load_model(folder)


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


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    contents = [fruit(label, n) for label in range(6) for n in range(20)]
    labels = [LABELS[label] for label in range(6) for _ in range(20)]
    folder = tmp_path_factory.mktemp("small") / "model"
    return make_model(folder, "random:0", contents, labels, SIZE)


def python_says(found: Model, contents: list[bytes], top: int = 5) -> list[dict[str, Any]]:
    batch = pa.record_batch({"content": pa.array(contents, pa.binary())})
    rows = next(recognise(iter([batch]), make_recogniser(found, top=top)))
    return list(rows.to_pylist())


# --- files, without a browser ------------------------------------------------------------------


def needs_runtime() -> None:
    """Skip where npm couldn't be asked; in CI it has to be there."""
    if missing := missing_runtime():
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)


def text(files: Site, name: str) -> str:
    return files[name].read().decode()


def test_every_address_leads_to_a_file(small: Model) -> None:
    files = site(small, quantization.phone(small.content), service=True)
    page = text(files, "index.html")
    named = re.findall(r"""(?:src|href)="([^"]+)""", page)
    for name, file in files.items():
        if file.media_type.startswith("text/javascript") and "/" not in name:
            source = file.read().decode()
            found = re.findall(r"from '([^']+)'|new URL\('([^']+)', import", source)
            named += [either or other for either, other in found]
    named += [icon["src"] for icon in json.loads(text(files, "manifest.webmanifest"))["icons"]]
    assert len(named) > 15
    for name in named:
        assert (name.removeprefix("./") or "index.html") in files, name
        assert not name.startswith(("/", "http"))


def test_nothing_is_inline(small: Model) -> None:
    page = text(site(small, quantization.phone(small.content), service=True), "index.html")
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", page)
    assert "unsafe-inline" not in HEADERS["Content-Security-Policy"]
    assert "'unsafe-eval'" not in HEADERS["Content-Security-Policy"]


def test_what_may_be_kept_and_who_may_have_it(small: Model) -> None:
    needs_runtime()
    files = site(small, quantization.phone(small.content), service=True, needs_key=True)
    assert {name for name, file in files.items() if file.guarded} == {
        name for name in files if name.startswith("device/")
    }
    (phone,) = (name for name in files if name.endswith(".onnx"))
    assert "immutable" in files[phone].headers["Cache-Control"]
    assert "private" in files[phone].headers["Cache-Control"]
    for name in ("index.html", "app.js", "sw.js", "config.json", "device/device.json"):
        assert files[name].headers["Cache-Control"] == "no-cache"
    about = json.loads(text(files, "config.json"))
    assert about["key"] is True
    assert "labels" not in about  # those are for who has the key
    assert json.loads(
        text(site(small, quantization.phone(small.content), service=True), "config.json")
    )["labels"]


def test_the_worker_changes_with_any_file(small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first = site(small, quantization.phone(small.content), service=True)["sw.js"].digest
    assert site(small, quantization.phone(small.content), service=True)["sw.js"].digest == first
    monkeypatch.setattr(page_module, "SHOWN", 2)
    assert site(small, quantization.phone(small.content), service=True)["sw.js"].digest != first


@pytest.mark.parametrize("damage", ["gone", "cut", "another version"])
def test_without_a_runtime(
    small: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    needs_runtime()
    shutil.copytree(ROOT / "src/pomona/web/assets", tmp_path / "web")
    monkeypatch.setattr(page_module, "_folder", lambda: tmp_path / "web")
    runtime = tmp_path / "web" / "runtime"
    if damage == "gone":
        shutil.rmtree(runtime)
    elif damage == "cut":
        (runtime / "ort.wasm.min.mjs").write_text("cut")
    else:
        about = json.loads((runtime / "runtime.json").read_text())
        (runtime / "runtime.json").write_text(json.dumps({**about, "version": "0.0.1"}))
    about = json.loads(
        text(files := site(small, quantization.phone(small.content), service=True), "config.json")
    )
    assert "on the device: " in caplog.text
    assert about["device"] is False
    assert "make runtime" in about["device_reason"]
    assert not [name for name in files if name.startswith(("runtime/", "device/"))]
    with pytest.raises(MissingError, match=r"no way to answer.*make runtime"):
        site(small, quantization.phone(small.content), service=False)


def test_the_runtime_is_pinned() -> None:
    asked = json.loads((ROOT / "package.json").read_text())["dependencies"]
    assert asked == {"onnxruntime-web": RUNTIME}
    lock = json.loads((ROOT / "package-lock.json").read_text())["packages"]
    assert lock["node_modules/onnxruntime-web"]["version"] == RUNTIME
    for name, about in lock.items():
        assert "resolved" not in about
        assert not name or about["integrity"].startswith("sha512-"), name


@pytest.fixture
def out(small: Model, tmp_path: Path) -> Path:
    shutil.copytree(small.folder, tmp_path / "out" / "model")
    (tmp_path / "out" / "manifest.json").write_text("{}")
    return tmp_path / "out"


def test_export_writes_the_page(out: Path, tmp_path: Path) -> None:
    needs_runtime()
    options = ExportOptions(web=str(tmp_path / "web"))
    record = export.export(out, options)
    assert record["web"] == {"folder": str(tmp_path / "web"), "file": "phone.onnx"}
    files = {p.relative_to(tmp_path / "web").as_posix() for p in (tmp_path / "web").rglob("*.*")}
    about = json.loads((tmp_path / "web/device/device.json").read_text())
    phone = (tmp_path / "web/device" / about["file"]).read_bytes()
    assert phone == (out / "export/phone.onnx").read_bytes()
    assert {"index.html", "sw.js", "config.json"} < files
    assert json.loads((tmp_path / "web/config.json").read_text())["service"] is False
    assert "Content-Security-Policy" in (tmp_path / "web/index.html").read_text()
    export.export(out, options)  # over the one that is there
    (tmp_path / "web/mine.txt").write_text("mine")
    with pytest.raises(RequestError, match=r"holds mine\.txt, which isn't the page's"):
        export.export(out, options)
    assert (tmp_path / "web/mine.txt").read_text() == "mine"


def test_export_refuses_places(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project/config.json").write_text("{}")
    with pytest.raises(RequestError, match="choose a new folder"):
        export.export(out, ExportOptions(web=str(tmp_path / "project")))
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="--web is a folder"):
        export.export(out, ExportOptions(web=str(tmp_path / "file")))
    with pytest.raises(RequestError, match="two folders apart"):
        export.export(out, ExportOptions(web=str(out / "export" / "web")))
    monkeypatch.setattr(page_module, "missing_runtime", lambda: "no runtime: make runtime")
    with pytest.raises(MissingError, match="--web is refused: no runtime"):
        export.export(out, ExportOptions(web=str(tmp_path / "web")))
    assert not (out / "export").exists()


# --- a browser ---------------------------------------------------------------------------------


class Visitor:
    """Somebody who looks at the page. Anything on the console that isn't expected is an error."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 390, "height": 844}} | options)
        self.url = url
        self.told: list[str] = []
        self.asked: list[str] = []
        self.expected: tuple[str, ...] = ("Service Worker registration blocked by Playwright",)
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.open()

    def open(self) -> None:
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.told.append(message.text))
        self.page.on("pageerror", lambda error: self.told.append(str(error)))
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
        assert [line for line in self.told if not line.startswith(self.expected)] == []


REFUSED = "Failed to load resource: the server responded with a status of"


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visitor]]:
    all_of_them: list[Visitor] = []

    def come(url: str, **options: Any) -> Visitor:
        all_of_them.append(Visitor(browser, url, **options))
        return all_of_them[-1]

    yield come
    for visitor in all_of_them:
        visitor.close()


# --- with the service --------------------------------------------------------------------------


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
def serve(found: Model, **settings: Any) -> Iterator[Served]:
    service = pytest.importorskip("pomona.serving.app", reason="needs the extra serve")
    from tests.service import running

    served = Served(service.create(lambda: found, service.Settings(workers=1, **settings)))
    with running(served) as url:
        served.url = f"{url.rstrip('/')}/"
        yield served


@pytest.fixture(scope="module")
def served(small: Model) -> Iterator[Served]:
    with serve(small) as running:
        yield running


def test_a_file(served: Served, small: Model, visit: Any) -> None:
    visitor = visit(served.url)
    assert visitor("knows") == "It knows Apple, Cherry, Pear, Plum, Quince and Tomato."
    assert visitor.see(fruit(2, 50)) == "Pear"
    (said,) = python_says(small, [fruit(2, 50)])
    rows = visitor("bars").split("\n")
    assert rows[::2] == said["nearest"]
    assert len(rows) == 10
    assert re.fullmatch(r"[\d.]+ ms on the server", visitor("facts"))
    assert f"model {small.version}" in visitor("about")
    share = min(99, round(100 * said["probability"]))  # 100 % would be certain
    assert visitor("status") == f"photo0.jpg: Pear, {share} %."


def test_several_files_and_clear(served: Served, visit: Any) -> None:
    visitor = visit(served.url)
    most = 0
    going = set()

    def begins(request: Any) -> None:
        nonlocal most
        if request.method == "POST":
            going.add(request)
            most = max(most, len(going))

    visitor.page.on("request", begins)

    def ends(request: Any) -> None:
        going.discard(request)

    visitor.page.on("requestfinished", ends)
    assert visitor.see(*[fruit(label, 60) for label in range(6)]) == "Apple"
    captions = visitor.page.locator("#strip .caption").all_inner_texts()
    assert captions == list(LABELS)
    assert most == 2
    visitor.page.locator("#strip button").nth(4).click()
    assert visitor("title") == "Quince"
    assert visitor.page.locator("#strip [aria-current=true]").inner_text() == "Quince"
    made = visitor.page.locator("#photo").get_attribute("src")
    visitor.page.locator("#clear").click()
    assert visitor.states() == []
    assert not visitor.page.locator("#answer").is_visible()
    assert visitor.page.evaluate("document.activeElement.id") == "choose"
    # The picture's memory is given back: its address leads nowhere.
    gone = "address => fetch(address).then(() => 'there', () => 'gone')"
    visitor.expected += ("Connecting to 'blob:", "Fetch API cannot load blob:", "Failed to load")
    assert visitor.page.evaluate(gone, made) == "gone"


def test_only_the_last_ones_stay(served: Served, visit: Any) -> None:
    visitor = visit(served.url)
    visitor.see(*[fruit(0)] * 30)
    assert len(visitor.states()) == 24
    visitor.see(fruit(1))
    assert len(visitor.states()) == 24
    assert visitor("title") == "Cherry"
    visitor.page.locator("#strip button").last.click()  # far below the answer, on a phone
    top, bottom, height = visitor.page.evaluate(
        "(({ top, bottom }) => [top, bottom, innerHeight])"
        "(document.getElementById('answer').getBoundingClientRect())"
    )
    assert visitor("title") == "Apple"
    assert -1 < top < bottom < height + 1  # whole pixels


DECODED = """() => {
  const [decode, close] = [createImageBitmap, ImageBitmap.prototype.close];
  let held = 0;
  window.most = 0;
  window.createImageBitmap = async (...given) => {
    most = Math.max(most, ++held);
    return decode(...given);
  };
  ImageBitmap.prototype.close = function () {
    held--;
    close.call(this);
  };
}"""


def test_one_photo_is_decoded_at_a_time(served: Served, visit: Any) -> None:
    visitor = visit(served.url)
    visitor.page.evaluate(DECODED)
    visitor.choose(*[fruit(0)] * 6)
    visitor.until(lambda: visitor.page.locator("#strip img:visible").count() == 6)
    assert visitor.page.evaluate("most") == 1
    visitor.settled()


PASTE = """([kind, content]) => {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], 'image.png', { type: 'image/jpeg' }));
  const given = kind === 'paste' ? { clipboardData: data } : { dataTransfer: data };
  const made = kind === 'paste' ? ClipboardEvent : DragEvent;
  document.body.dispatchEvent(new made(kind, { ...given, bubbles: true, cancelable: true }));
}"""


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_paste_and_drop(served: Served, visit: Any, way: str) -> None:
    visitor = visit(served.url)
    visitor.page.evaluate(PASTE, [way, base64.b64encode(fruit(3)).decode()])
    visitor.until(lambda: visitor("title") == "Plum")
    assert visitor("name") == {"paste": "Pasted photo", "drop": "image.png"}[way]


@pytest.mark.parametrize("mode", ["service", "device"])
def test_not_a_fruit(served: Served, small: Model, visit: Any, mode: str) -> None:
    visitor = visit(served.url)
    if mode == "device":
        needs_runtime()
        visitor.on_device()
    assert visitor.see(STRANGE) == "Not a fruit that I know"
    (said,) = python_says(small, [STRANGE])
    assert said["unknown"]
    assert visitor("text").rstrip(".").lower() == said["reason"]
    assert visitor("nearest") == "Most like"
    assert visitor("bars").split("\n")[::2] == said["nearest"]
    assert visitor.page.locator("#strip .caption").inner_text() == "Unknown"
    assert "Not a fruit that I know" in visitor("status")


BROKEN = {
    "This file is empty": b"",
    "This isn’t a photo": b"<html>no photo</html>",
    "This photo is damaged or cut off": photo(1)[:900],
}


@pytest.mark.parametrize("mode", ["service", "device"])
def test_broken_files(served: Served, visit: Any, mode: str) -> None:
    visitor = visit(served.url)
    visitor.expected += (f"{REFUSED} 4",)
    if mode == "device":
        needs_runtime()
        visitor.on_device()
    for title, content in BROKEN.items():
        assert visitor.see(content) == title
        assert visitor.page.locator("#actions button").count() == 0  # again would be the same
        assert title in visitor("status")
    assert visitor.see(fruit(0)) == "Apple"


def test_the_server_is_down(served: Served, visit: Any) -> None:
    visitor = visit(served.url, service_workers="block")
    visitor.expected += ("Failed to load resource: net::ERR_CONNECTION_REFUSED",)
    visitor.page.route("**/v1/predict*", lambda route: route.abort("connectionrefused"))
    assert visitor.see(fruit(0)) == "The service doesn’t answer"
    assert "try again" in visitor("text")
    visitor.page.unroute("**/v1/predict*")
    visitor.page.get_by_role("button", name="Try again", exact=True).click()
    visitor.settled()
    assert visitor("title") == "Apple"


def test_try_again_by_keyboard(served: Served, visit: Any) -> None:
    visitor = visit(served.url, service_workers="block")
    visitor.expected += ("Failed to load resource: net::ERR_CONNECTION_REFUSED",)
    routes: list[Any] = []
    hold = lambda route: routes.append(route)  # noqa: E731, PLW0108 - Playwright takes no builtin
    visitor.page.route("**/v1/predict*", hold)
    visitor.choose(fruit(0), fruit(1))
    visitor.until(lambda: len(routes) == 2)
    routes[0].abort("connectionrefused")
    visitor.page.get_by_role("button", name="Try again", exact=True).focus()
    routes[1].abort("connectionrefused")
    visitor.until(lambda: visitor.states() == ["error", "error"])
    assert visitor.focused() == "Try again"
    visitor.page.unroute("**/v1/predict*")
    visitor.page.keyboard.press("Enter")
    visitor.until(lambda: visitor("title") == "Apple")
    assert visitor.focused() == "title"


def busy(times: int, then: list[float]) -> Callable[[Any], None]:
    """Answer as the service does when its queue is full."""
    problem = {"title": "Overloaded", "status": 503, "code": "overloaded", "detail": "full"}

    def answer(route: Any) -> None:
        then.append(time.monotonic())
        if len(then) > times:
            route.continue_()
            return
        headers = {"Retry-After": "1", "Content-Type": "application/problem+json"}
        route.fulfill(status=503, headers=headers, body=json.dumps(problem))

    return answer


def test_the_service_is_busy(served: Served, visit: Any) -> None:
    visitor = visit(served.url, service_workers="block")
    visitor.expected += (f"{REFUSED} 503",)
    times: list[float] = []
    visitor.page.route("**/v1/predict*", busy(1, times))
    visitor.choose(fruit(0))
    visitor.until(lambda: "Trying again in 1 s" in visitor("text"))
    visitor.settled()
    assert visitor("title") == "Apple"
    assert times[1] - times[0] > 0.9
    visitor.page.unroute("**/v1/predict*")
    times.clear()
    visitor.page.route("**/v1/predict*", busy(2, times))
    assert visitor.see(fruit(1)) == "The service is busy"
    assert len(times) == 2  # it asks again once, and then leaves it to people
    visitor.page.get_by_role("button", name="Try again", exact=True).click()
    visitor.settled()
    assert visitor("title") == "Cherry"


def test_really_busy(small: Model, visit: Any, brake: Brake) -> None:
    """One photo is in work, one waits, and there is no room for a third."""
    with serve(small, queue=1) as served:
        waiting = served.app.state.service.pool
        other = visit(served.url)
        other.expected += (f"{REFUSED} 503",)
        other.choose(fruit(0), fruit(1))
        other.until(lambda: bool(brake.begun))  # before, the first photo may be the one that waits
        other.until(lambda: waiting.waiting == 1)
        visitor = visit(served.url)
        visitor.expected += (f"{REFUSED} 503",)
        visitor.choose(fruit(2))
        visitor.until(lambda: "Trying again in 1 s" in visitor("text"))
        brake.go.set()
        for each, title in ((visitor, "Pear"), (other, "Apple")):
            each.settled()
            assert each("title") == title


def test_busy_and_then_on_the_device(served: Served, visit: Any) -> None:
    needs_runtime()
    visitor = visit(served.url, service_workers="block")
    visitor.expected += (f"{REFUSED} 503",)
    visitor.page.route("**/v1/predict*", busy(9, []))
    assert visitor.see(fruit(1)) == "The service is busy"
    visitor.page.get_by_role("button", name="Answer on this device").click()
    visitor.until(lambda: visitor("title") == "Cherry")
    assert visitor("facts").endswith("ms on this device")


KEY = "apple-pie-apple-pie"


def test_a_key(small: Model, visit: Any) -> None:
    needs_runtime()
    with serve(small, keys=(KEY,)) as served:
        with_a_key(visit(served.url))


def with_a_key(visitor: Visitor) -> None:
    visitor.expected += (f"{REFUSED} 401",)
    visitor.choose(fruit(0), fruit(1))
    dialog = visitor.page.locator("#ask")
    visitor.until(dialog.is_visible)
    assert visitor.page.evaluate("document.activeElement.id") == "key"
    visitor.page.keyboard.type("“apple-pie-apple-pie”")
    visitor.page.keyboard.press("Enter")
    assert "only plain letters" in visitor("ask-text")
    visitor.page.keyboard.type("wrong")
    visitor.page.keyboard.press("Enter")
    visitor.until(lambda: "not accepted" in visitor("ask-text") and dialog.is_visible())
    visitor.page.keyboard.press("Escape")
    assert visitor("title") == "A key is needed"
    visitor.page.get_by_role("button", name="Enter the key").click()
    visitor.page.keyboard.type(KEY)
    visitor.page.keyboard.press("Enter")
    visitor.settled()
    assert visitor("title") == "Apple"
    assert visitor.states() == ["done", "done"]
    visitor.on_device()
    assert visitor.see(fruit(2)) == "Pear"
    assert visitor.page.evaluate("localStorage.getItem('pomona.key')") is None


BLOCKED = """for (const name of ['localStorage', 'sessionStorage']) {
  Object.defineProperty(window, name, {
    get() {
      throw new DOMException('blocked', 'SecurityError');
    },
  });
}"""


def test_a_key_where_site_data_is_blocked(small: Model, visit: Any) -> None:
    with serve(small, keys=(KEY,)) as served:
        visitor = visit(served.url)
        visitor.page.add_init_script(BLOCKED)
        visitor.page.reload()
        visitor.until(lambda: visitor("where") != "")
        visitor.choose(fruit(0), fruit(1))
        visitor.until(visitor.page.locator("#ask").is_visible)
        visitor.page.keyboard.type(KEY)
        visitor.page.keyboard.press("Enter")
        visitor.settled()
        assert visitor.states() == ["done", "done"]


# --- on the device -----------------------------------------------------------------------------


SPOKEN = """() => {
  window.spoken = [];
  new MutationObserver((records) => {
    for (const { addedNodes } of records) for (const { data } of addedNodes) spoken.push(data);
  }).observe(document.getElementById('status'), { childList: true });
}"""


def test_loading_is_announced(served: Served, visit: Any) -> None:
    needs_runtime()
    visitor = visit(served.url, service_workers="block")
    visitor.expected += ("Failed to load resource: net::ERR_FAILED",)
    visitor.page.evaluate(SPOKEN)
    visitor.page.route("**/device/device.json", lambda route: route.abort())
    visitor.page.locator("#here").check()
    visitor.until(lambda: "isn’t on this device yet" in visitor("where"))
    visitor.page.unroute("**/device/device.json")
    visitor.page.locator("#here").uncheck()
    visitor.on_device()
    begins, fails, begins_again, ends = visitor.page.evaluate("spoken")
    assert begins == begins_again == "Loading the model …"
    assert fails.startswith("The model isn’t on this device yet")
    assert ends == "The model is loaded."


def test_no_request_goes_out(served: Served, small: Model, visit: Any) -> None:
    needs_runtime()
    visitor = visit(served.url)
    visitor.on_device()
    before, asked = len(visitor.asked), len(served.asked)
    photos = [fruit(label, 70) for label in range(6)] + [STRANGE]
    visitor.see(*photos)
    visitor.page.wait_for_timeout(300)
    sent = [url for url in visitor.asked[before:] if not url.startswith("blob:")]
    assert sent == []  # as the browser sees it, with its workers
    # And as the server sees it; the browser itself asks now and then for a newer service worker.
    assert set(served.asked[asked:]) <= {"/sw.js"}
    assert visitor.states() == ["done"] * 6 + ["unknown"]


def test_threads(served: Served, visit: Any) -> None:
    """Also once the service worker gives the files: their headers must be right for threads."""
    needs_runtime()
    visitor = visit(f"{served.url}?runtime=wasm&threads=3")
    for _ in range(2):
        visitor.on_device()
        assert visitor.page.evaluate(STARTED) == {"backend": "wasm", "threads": 3}
        assert visitor.see(fruit(0)) == "Apple"
        visitor.kept()
        visitor.page.close()
        visitor.open()


STARTED = """async () => {
  const { start } = await import('./device.js');
  const { backend, threads } = await start();
  return { backend, threads };
}"""


def test_over_plain_http_from_another_machine(served: Served, visit: Any) -> None:
    needs_runtime()
    visitor = visit(served.url.replace("127.0.0.1", "fruit.test"))
    visitor.expected += ("The Cross-Origin-Opener-Policy header has been ignored",)
    assert visitor.page.evaluate("isSecureContext") is False
    visitor.on_device()
    assert visitor.see(fruit(2)) == "Pear"
    visitor.page.locator("#here").uncheck()
    assert visitor.see(fruit(3)) == "Plum"


HUNG = b"if (self.name.startsWith('em-pthread')) await new Promise(() => {});\n"
"""Before the runtime's script: in its threads it never comes to an end."""


def test_a_runtime_that_hangs_gets_another_try(small: Model, visit: Any) -> None:
    needs_runtime()
    with serve(small) as served:
        files = dict(served.app.state.service.site)
        glue = f"runtime/{RUNTIME}/ort-wasm-simd-threaded.mjs"
        files[glue] = replace(files[glue], content=HUNG + files[glue].read())
        patient = files["worker.js"].read()
        hasty = patient.replace(b"PATIENCE = 20_000", b"PATIENCE = 1_000")
        assert hasty != patient
        files["worker.js"] = replace(files["worker.js"], content=hasty)
        served.app.state.service.site = files
        visitor = visit(f"{served.url}?threads=3", service_workers="block")
        visitor.on_device()
        assert visitor.page.evaluate(STARTED) == {"backend": "wasm", "threads": 1}
        assert visitor.see(fruit(0)) == "Apple"


def test_offline_after_the_first_visit(small: Model, visit: Any) -> None:
    needs_runtime()
    with serve(small) as served:
        visitor = visit(served.url)
        visitor.on_device()
        visitor.kept()
    with pytest.raises(OSError):
        urllib.request.urlopen(served.url, timeout=5)
    visitor.expected += ("Failed to load resource: net::ERR_CONNECTION_REFUSED",)
    visitor.page.close()
    visitor.open()
    visitor.until(lambda: visitor("where").startswith("Photos stay"))
    assert visitor.see(fruit(4)) == "Quince"
    visitor.page.locator("#here").uncheck()
    assert visitor.see(fruit(4)) == "The service doesn’t answer"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass


def host(folder: Path) -> http.server.ThreadingHTTPServer:
    """A plain static host, which sends none of our headers."""
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_static_files_in_a_folder_of_a_host(small: Model, tmp_path: Path, visit: Any) -> None:
    needs_runtime()
    write(
        tmp_path / "fruit" / "page", site(small, quantization.phone(small.content), service=False)
    )
    server = host(tmp_path)
    visitor = visit(f"http://127.0.0.1:{server.server_port}/fruit/page/")
    assert not visitor.page.locator("#here").is_visible()
    visitor.until(lambda: visitor("where").startswith("Photos stay"))
    assert visitor.see(fruit(5)) == "Tomato"
    visitor.kept()
    server.shutdown()
    server.server_close()
    visitor.expected += ("Failed to load resource: net::ERR_CONNECTION_REFUSED",)
    visitor.page.close()
    visitor.open()
    visitor.until(lambda: visitor("where").startswith("Photos stay"))
    assert visitor.see(fruit(3), STRANGE) == "Plum"
    assert visitor.states() == ["done", "unknown"]
    # The service worker gives the headers that a static host doesn't: threads are allowed.
    assert visitor.page.evaluate("crossOriginIsolated") is True


def test_a_new_version_is_taken(small: Model, visit: Any) -> None:
    with serve(small) as served:
        another_version(served, visit(served.url))


def another_version(served: Served, visitor: Visitor) -> None:
    visitor.kept()
    names = "caches.keys().then((names) => names.filter((name) => name.includes('page')))"
    (old,) = visitor.page.evaluate(names)
    files = dict(served.app.state.service.site)
    changed = files["index.html"].read().replace(b"Which fruit is this?", b"What is this?")
    files["index.html"] = replace(files["index.html"], content=changed)
    files["sw.js"] = _file(_folder() / "sw.js")
    files["sw.js"] = _service_worker(files)
    served.app.state.service.site = files
    visitor.page.reload()
    assert visitor.page.locator("h1").inner_text() == "What is this?"
    visitor.until(lambda: visitor.page.evaluate(names) not in ([old], []))
    visitor.until(lambda: len(visitor.page.evaluate(names)) == 1)
    visitor.see(fruit(0))
    stored = visitor.page.evaluate(
        """async () => {
          const found = [];
          for (const name of await caches.keys()) {
            for (const request of await (await caches.open(name)).keys()) found.push(request.url);
          }
          return found;
        }"""
    )
    assert stored
    assert not [url for url in stored if "/v1/" in url]


# --- same photo, same answer -------------------------------------------------------------------

PIXELS = """async ([content, size]) => {
  const { pixelsOf } = await import('./pixels.js');
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const pixels = await pixelsOf(new Blob([bytes]), size);
  let text = '';
  for (let at = 0; at < pixels.length; at += 8192) {
    text += String.fromCharCode(...pixels.subarray(at, at + 8192));
  }
  return btoa(text);
}"""


def kinds() -> dict[str, tuple[bytes, int]]:
    """Photos of many kinds, and the largest difference that is allowed: 8-bit rounding."""
    image = Image.open(io.BytesIO(photo(7, (333, 217))))
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "jpeg": (encoded(image, quality=95), 0),
        "enlarged": (photo(8, (20, 31)), 0),
        "png": (encoded(image, "PNG"), 0),
        "grey": (encoded(image.convert("L"), "PNG"), 0),
        "palette": (encoded(image.convert("P"), "PNG"), 0),
        "transparent": (encoded(alpha, "PNG"), 2),
        "turned": (encoded(image, exif=turned.tobytes()), 0),
        "progressive": (encoded(image, progressive=True), 0),
        "bmp": (encoded(image, "BMP"), 0),
        "gif": (encoded(image.convert("P"), "GIF"), 0),
        "webp": (encoded(image, "WEBP", lossless=True), 0),
        "large jpeg": (photo(9, (1920, 1080)), 4),
        "tall": (encoded(image.resize((60, 2900)), "PNG"), 0),
    }


def test_pixels_are_pythons(served: Served, visit: Any) -> None:
    visitor = visit(served.url)
    for name, (content, most) in kinds().items():
        told = visitor.page.evaluate(PIXELS, [base64.b64encode(content).decode(), 224])
        found = np.frombuffer(base64.b64decode(told), np.uint8).reshape(224, 224, 3)
        wanted = decoding.decode(content, 224).pixels
        assert wanted is not None
        assert np.abs(found.astype(int) - wanted).max() <= most, name


@pytest.fixture(scope="module")
def real(
    real_photos: Path, real_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Model, list[bytes]]:
    """A model trained on 150 real photos, and 200 others."""
    drawn = random.Random(0).sample(sorted(real_photos.rglob("*.jpg")), 350)
    contents = [path.read_bytes() for path in drawn]
    labels = [path.relative_to(real_photos).parts[1] for path in drawn]
    folder = tmp_path_factory.mktemp("real-model") / "model"
    made = make_model(folder, str(real_weights), contents[:150], labels[:150], 224)
    return made, contents[150:]


SAYS = """async ([kind, contents]) => {
  const { recognise } = await import(`./${kind}.js`);
  const found = [];
  for (const content of contents) {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    const file = new File([bytes], 'photo.jpg', { type: 'image/jpeg' });
    found.push((await (kind === 'device' ? recognise(file) : recognise(file, null))).answer);
  }
  return found;
}"""


def test_same_photo_same_answer(real: tuple[Model, list[bytes]], visit: Any) -> None:
    needs_runtime()
    found, contents = real
    sent = [base64.b64encode(content).decode() for content in contents]
    with serve(found) as served:
        visitor = visit(served.url)
        visitor.on_device()
        answers = {
            kind: visitor.page.evaluate(SAYS, [kind, sent]) for kind in ("device", "service")
        }
    told = python_says(found, contents)
    differences = {}
    for kind, said in answers.items():
        assert len(said) == len(told) == 200
        for ours, theirs in zip(told, said, strict=True):
            for name in ("label", "unknown", "reason", "error"):
                assert theirs[name] == ours[name], kind
            assert [near["label"] for near in theirs["nearest"]] == ours["nearest"], kind
        differences[kind] = max(
            abs(p - near["probability"])
            for ours, theirs in zip(told, said, strict=True)
            for p, near in zip(ours["probabilities"], theirs["nearest"], strict=True)
        )
    assert max(differences.values()) < 0.02
    assert len({row["label"] for row in told}) == 4  # three fruit, and unknown ones


# --- for everybody -----------------------------------------------------------------------------


def test_on_a_phone(served: Served, visit: Any) -> None:
    visitor = visit(
        served.url, viewport={"width": 320, "height": 640}, is_mobile=True, has_touch=True
    )
    page = visitor.page
    assert page.locator("#take").is_visible()
    assert page.locator("#camera").get_attribute("capture") == "environment"
    content = {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": fruit(1)}
    page.set_input_files("#camera", [content])
    visitor.settled()
    assert visitor("title") == "Cherry"
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    for control in page.locator("button:visible, label.switch").all():
        assert control.bounding_box()["height"] >= 44  # for a finger


def test_by_keyboard(served: Served, visit: Any) -> None:
    visitor = visit(served.url, viewport={"width": 1280, "height": 800})
    page = visitor.page
    visitor.see(fruit(0), fruit(1))

    def step() -> str:
        page.keyboard.press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"  # one sees where one is
        return str(visitor.focused())

    page.evaluate("document.activeElement.blur()")
    way = [step() for _ in range(6)]
    assert way[:4] == ["Pomona", "here", "choose", "clear"]
    assert [word.split(":")[0] for word in way[4:]] == ["photo0.jpg", "photo1.jpg"]
    page.keyboard.press("Enter")
    assert visitor("title") == "Cherry"
    assert visitor("status").startswith("photo1.jpg: Cherry")
    assert page.locator("#photo").get_attribute("alt") == "The photo photo1.jpg"
    assert visitor.focused().startswith("photo1.jpg: Cherry")
    assert visitor.see(fruit(2)) == "Pear"  # another photo before it
    assert visitor.focused().startswith("photo1.jpg: Cherry")
    with page.expect_file_chooser():
        page.locator("#choose").press("Enter")


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2 of rgb(…)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


CONTRASTS = """() => {
  const found = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = Array.from(node.childNodes).some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !node.checkVisibility() || node.closest('.sr')) continue;
    let behind = node;
    while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') {
      behind = behind.parentElement;
    }
    const { color } = getComputedStyle(node);
    found.push([node.textContent.trim(), color, getComputedStyle(behind).backgroundColor]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(served: Served, visit: Any, scheme: str) -> None:
    visitor = visit(served.url, color_scheme=scheme)
    visitor.expected += (f"{REFUSED} 4",)
    visitor.choose(STRANGE, fruit(0), b"no photo")
    visitor.settled()
    seen = 0
    for number in range(3):
        visitor.page.locator("#strip button").nth(number).click()
        for words, ink, paper in visitor.page.evaluate(CONTRASTS):
            low, high = sorted((luminance(ink), luminance(paper)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, words
            seen += 1
    assert seen > 40


def test_reduced_motion(served: Served, visit: Any) -> None:
    visitor = visit(served.url, reduced_motion="reduce")
    moving = "document.getAnimations().length"
    visitor.page.route("**/v1/predict*", lambda route: None)
    visitor.choose(fruit(0))
    visitor.until(lambda: visitor("title") == "Looking …")
    assert visitor.page.evaluate(moving) == 0
