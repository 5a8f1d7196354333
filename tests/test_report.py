from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pomona import report, stages
from pomona.stages import ExtractOptions, ReduceOptions, TrainOptions
from tests.conftest import fill, photo
from tests.test_training import varieties

for name in ("sklearn", "matplotlib", "jinja2"):
    pytest.importorskip(name)

QUICK = ExtractOptions(weights="random:0", image_size=32, device="cpu")
HOSTILE = """<script>alert("1")</script>'&}}"""


@pytest.fixture(scope="module")
def out(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT with everything that a report can show, and names that are hostile."""
    base = tmp_path_factory.mktemp("report")
    source = varieties(base / "source")
    for split in ("Training", "Test"):  # a slash can't be in a name
        folder = source / split / HOSTILE.replace("/", "∕")
        (folder / "kind 1").mkdir(parents=True)
        (folder / "kind 2").mkdir()
        for n in range(12):
            path = folder / f"kind {n % 2 + 1}" / f"{n}<b>.jpg"
            path.write_bytes(photo(5000 + n))
    (source / "Training" / "Fruit 0" / "Kind 0-0" / "cut.jpg").write_bytes(photo(3)[:900])
    (source / "Training" / "Fruit 0" / "Kind 0-0" / "no.jpg").write_text("no photo")
    options = replace(QUICK, label="top")
    stages.run(source, base / "out", options, ReduceOptions(8), train_options=TrainOptions())
    return base / "out"


def test_the_page_holds_every_part(out: Path) -> None:
    page = (out / "report" / "report.html").read_text()
    for part in ("data", "variance", "map", "figures", "unknown", "leakage", "times", "card"):
        assert f'<h2 id="{part}">' in page
    told = json.loads((out / "report" / "metrics.json").read_text())
    assert f"{100 * told['test']['accuracy']['value']:.1f} %" in page
    assert "untrained" in page
    assert "truncated" in page
    assert page.count("data:image/jpeg;base64,") > 20
    assert "The worst mistakes" in page


def test_it_needs_no_network(out: Path) -> None:
    page = (out / "report" / "report.html").read_text()
    links = re.findall(r"""(?:src|href)=["']([^"']*)|url\(["']?([^"')]*)""", page)
    assert all(link.startswith(("data:", "#")) for pair in links for link in pair if link)
    assert "default-src 'none'" in page


def test_hostile_names_are_text(out: Path) -> None:
    page = (out / "report" / "report.html").read_text()
    assert '<script>alert("1")' not in page
    assert "&lt;script&gt;alert(" in page
    data = re.search(r'<script type="application/json" id="points">(.*?)</script>', page, re.S)
    assert data
    assert HOSTILE.replace("/", "∕") in json.loads(data[1])["names"]


def test_the_same_twice_but_for_times(out: Path) -> None:
    first = (out / "report" / "report.html").read_text()
    assert stages.report(out).read_text() == first


def test_before_a_model_and_without_the_source(spark: Any, tmp_path: Path) -> None:
    source = fill(tmp_path / "source")
    (source / "Training" / "Fruit 0" / "bad.jpg").write_bytes(b"")
    stages.run(source, tmp_path / "o", QUICK, ReduceOptions(5))
    page = (tmp_path / "o/report/report.html").read_text()
    assert "None has been trained" in page
    assert "no picture" in page
    shutil.rmtree(source)
    page = stages.report(tmp_path / "o").read_text()
    assert page.count("data:image/jpeg") == 1  # the map's sheet, grey


def test_many_labels_and_no_test(spark: Any, tmp_path: Path) -> None:
    source = fill(tmp_path / "source", labels=34, each=4)
    stages.run(source, tmp_path / "o", QUICK, ReduceOptions(5), train_options=TrainOptions())
    page = (tmp_path / "o/report/report.html").read_text()
    assert "The other 4" in page
    assert "<th>true</th><th>predicted</th>" in page
    shutil.rmtree(source / "Test")
    stages.run(source, tmp_path / "o", QUICK, ReduceOptions(5), train_options=TrainOptions())
    page = (tmp_path / "o/report/report.html").read_text()
    assert "There are no Test photos" in page


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "jinja2" else name)
    with pytest.raises(stages.RequestError, match=r"jinja2: pip install 'pomona\[report\]'"):
        report.check_matplotlib()


# --- in a browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=chromium,
            args=[*flags, "--disable-component-update", "--disable-sync"],
        )
        yield found
        found.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_it_opens_without_an_error(out: Path, browser: Any, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    told: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((out / "report" / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#canvas").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#words").inner_text().count("Training") >= 1
    page.locator(".legend button").first.click()
    assert page.locator(".legend button").first.get_attribute("aria-pressed") == "false"
    area = page.locator("#canvas").bounding_box()
    for part in range(1, 20):
        page.mouse.move(
            area["x"] + area["width"] * part / 20, area["y"] + area["height"] * part / 20
        )
    assert told == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()
