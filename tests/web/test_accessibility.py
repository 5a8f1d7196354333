"""The page for everybody: phones, keyboards, contrast, reduced motion."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.web.visitor import REFUSED, STRANGE, Served, fruit

pytest.importorskip("sklearn")


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
