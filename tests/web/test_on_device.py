"""The page in a browser, answering on the device, and as static files."""

from __future__ import annotations

import functools
import http.server
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pomona.export.phone import page_files
from pomona.model.artifact import Model
from pomona.web.page import RUNTIME, _file, _folder, _service_worker, write
from tests.web.visitor import STRANGE, Served, Visitor, fruit, needs_runtime, serve

pytest.importorskip("sklearn")


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


def test_over_plain_http_from_another_machine(small: Model, visit: Any) -> None:
    needs_runtime()
    with serve(small, hosts={"fruit.test"}) as served:
        from_another_machine(visit(served.url.replace("127.0.0.1", "fruit.test")))


def from_another_machine(visitor: Visitor) -> None:
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
        impatient = b"initTimeout = wanted === 1 ? PATIENCE : 1_000"  # the other try has time
        hasty = patient.replace(b"initTimeout = PATIENCE", impatient)
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
    write(tmp_path / "fruit" / "page", page_files(small, service=False))
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
