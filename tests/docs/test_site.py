"""The documentation as a site: it is built with warnings as errors, and looked at in a browser."""

from __future__ import annotations

import functools
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from docs import build_site

pytest.importorskip("zensical", reason="needs Python 3.11")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("documentation") / "site"
    build_site.build(to)
    return to


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def test_every_page_is_there_and_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    for name in build_site.pages().values():
        if name == "index.md":
            continue
        page = name.replace(".md", ".html")
        assert (site / page).exists()
        assert f'href="{page}"' in home, page


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    for page in site.glob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="([^"]*)"', page.read_text("utf-8")
        )
        assert loaded
        assert not [url for url in loaded if url.startswith(("http:", "https:", "//"))], page.name


def test_in_a_browser(browser: Any, address: str) -> None:
    """Navigation, a search that finds, pictures; and no request leaves this machine."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    assert page.locator("article img").evaluate_all("all => all.every(i => i.naturalWidth > 0)")
    page.locator("nav").get_by_role("link", name="Personal data").first.click()
    page.wait_for_url("**/privacy.html")
    assert page.get_by_role("heading", name="Erasing a photo").is_visible()
    page.keyboard.press("/")
    page.keyboard.type("tombstones")
    result = page.locator("a[href*='privacy.html']").filter(has_text=re.compile("tombstone", re.I))
    result.first.wait_for(timeout=60_000)
    page.close()
    assert not errors
    assert len(requests) > 3
    assert all(url.startswith((address, "data:", "blob:")) for url in requests), requests


def test_a_broken_link_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pages = build_site.pages()
    wrong = tmp_path / "log.md"
    wrong.write_text("# Log\n\n[nowhere](#no-such-heading)\n", encoding="utf-8")
    others = {page: name for page, name in pages.items() if name != "log.md"}
    monkeypatch.setattr(build_site, "pages", lambda: {**others, wrong: "log.md"})
    with pytest.raises(SystemExit, match="not built"):
        build_site.build(tmp_path / "site")
    assert "no-such-heading" in re.sub(r"\x1b\[[\d;]*m", "", "".join(capfd.readouterr()))
    assert not (tmp_path / "site").exists()
