"""The page in a browser, where the service asks for a key."""

from __future__ import annotations

from typing import Any

import pytest

from pomona.model.artifact import Model
from tests.web.visitor import REFUSED, Visitor, fruit, needs_runtime, serve

pytest.importorskip("sklearn")


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
    visitor.until(lambda: visitor.states() == ["error", "error"])  # each refusal asks again
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
