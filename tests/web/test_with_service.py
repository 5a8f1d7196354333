"""The page in a browser, with the service behind it."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from pomona.model.artifact import Model
from tests.conftest import Brake, photo
from tests.web.visitor import (
    LABELS,
    REFUSED,
    STRANGE,
    Served,
    fruit,
    needs_runtime,
    python_says,
    serve,
)

pytest.importorskip("sklearn")


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
