from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pomona.core.errors import RequestError
from pomona.photos import isolation
from pomona.pipeline import report_figures, report_page, run
from pomona.pipeline.reduce import ReduceOptions
from pomona.pipeline.train import TrainOptions
from pomona.workspace import layout
from tests.conftest import fill, photo
from tests.photos.test_isolation import worse
from tests.pipeline.conftest import QUICK, varieties

for name in ("sklearn", "matplotlib", "jinja2"):
    pytest.importorskip(name)

HOSTILE = """<script>alert("1")</script>'&}}"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    run.run(source, base / "out", options, ReduceOptions(8), train_options=TrainOptions())
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
    assert run.report(out).read_text() == first


def test_before_a_model_and_without_the_source(tmp_path: Path) -> None:
    source = fill(tmp_path / "source")
    (source / "Training" / "Fruit 0" / "bad.jpg").write_bytes(b"")
    run.run(source, tmp_path / "o", QUICK, ReduceOptions(5), train_options=None)
    page = (tmp_path / "o/report/report.html").read_text()
    assert "None has been trained" in page
    assert "no picture" in page
    shutil.rmtree(source)
    page = run.report(tmp_path / "o").read_text()
    assert page.count("data:image/jpeg") == 1  # the map's sheet, grey


def test_many_labels_and_no_test(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", labels=34, each=4)
    run.run(source, tmp_path / "o", QUICK, ReduceOptions(5), train_options=TrainOptions())
    page = (tmp_path / "o/report/report.html").read_text()
    assert "The other 4" in page
    assert "true</th>" in page and "predicted</th>" in page
    shutil.rmtree(source / "Test")
    run.run(source, tmp_path / "o", QUICK, ReduceOptions(5), train_options=TrainOptions())
    page = (tmp_path / "o/report/report.html").read_text()
    assert "There are no Test photos" in page


def test_counts_are_of_all_photos(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(out, tmp_path / "o")
    monkeypatch.setattr(run, "SEARCH_ROWS", 20)
    text = run.report(tmp_path / "o").read_text()
    assert re.search(r'<td>Fruit 0</td><td class="n">58</td>', text)  # 56, and two rejected ones
    told = re.search(r"(\d+) of (\d+) photos, of each label", text)
    assert told
    assert int(told[1]) < 60
    assert int(told[2]) == 192  # with features


def test_names_in_rejected_stay_text(tmp_path: Path) -> None:
    place = layout.Out(tmp_path)
    rows = ['"007","Training","007","empty"', '"NA\n1","Training","NA","empty"']
    place.rejected.write_text("\n".join(['"path","split","label","error"', *rows, ""]))
    found = report_page._rejected(place)
    assert [(row["path"], row["label"]) for row in found] == [("007", "007"), ("NA\n1", "NA")]


@pytest.mark.parametrize("stage", ["reduce", "train"])
def test_what_is_older_is_said(out: Path, tmp_path: Path, stage: str) -> None:
    shutil.copytree(out, tmp_path / "o")
    told = json.loads((tmp_path / "o" / "manifest.json").read_text())
    if stage == "reduce":
        told["stages"]["reduce"]["made_from"]["features"] = "another"
    else:
        told["stages"]["reduce"]["digests"]["training_pca"] = "another"
    assert "run pomona" not in (tmp_path / "o/report/report.html").read_text()
    (tmp_path / "o" / "manifest.json").write_text(json.dumps(told))
    assert f"run pomona {stage} again" in run.report(tmp_path / "o").read_text()


def test_a_source_out_of_reach_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def read(path: str) -> bytes:
        asked.append(path)
        raise OSError("no route")

    monkeypatch.setattr(report_figures, "reader", lambda source: read)
    monkeypatch.setattr(report_figures, "PATIENCE", -1.0)
    assert report_figures.read_thumbnails(str(tmp_path), [("1.jpg", 8)]) == {}
    assert not asked
    monkeypatch.setattr(report_figures, "PATIENCE", 60.0)
    wanted = [(f"{n}.jpg", size) for n in range(3) for size in (8, 16)]
    assert report_figures.read_thumbnails(str(tmp_path), wanted) == {}
    assert sorted(asked) == ["0.jpg", "1.jpg", "2.jpg"]
    clock = iter(range(0, 1000, 31))
    monkeypatch.setattr(report_figures, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    patient = report_figures.patient_reader(str(tmp_path))
    assert [patient(f"{n}.jpg") for n in range(9)] == [None] * 9
    assert len(asked) == 3 + 2  # 31 s each


def test_a_photo_that_kills_the_decoder_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report reads rejected photos again, in the driver."""
    monkeypatch.setattr(isolation, "_serve", worse)
    for name, content in {"a.jpg": photo(1), "b.jpg": b"crash", "c.jpg": photo(2)[:900]}.items():
        (tmp_path / name).write_bytes(content)
    shown = report_figures.read_thumbnails(str(tmp_path), [(f"{n}.jpg", 8) for n in "abc"])
    assert {path for path, _ in shown} == {"a.jpg", "c.jpg"}


def test_colours_are_seen_on_both_pages() -> None:
    for of in (2, 3, 12, 131):
        for n in range(of):
            code = report_page._colour(n, of)
            red, green, blue = (int(code[i : i + 2], 16) / 255 for i in (1, 3, 5))
            light = report_page._luminance((red, green, blue)) + 0.05
            assert 1.05 / light > 3
            assert light / (report_page._luminance((0x1D / 255, 0x23 / 255, 0x20 / 255)) + 0.05) > 3


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        report_figures, "find_spec", lambda name: None if name == "jinja2" else name
    )
    with pytest.raises(RequestError, match=r"jinja2: pip install 'pomona\[report\]'"):
        report_figures.check_matplotlib()


# --- in a browser ------------------------------------------------------------------------------


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


def test_a_tap_shows_the_photo(out: Path, browser: Any) -> None:
    context = browser.new_context(
        viewport={"width": 360, "height": 800}, has_touch=True, is_mobile=True
    )
    page = context.new_page()
    page.goto((out / "report" / "report.html").as_uri())
    page.locator("#canvas").scroll_into_view_if_needed()
    area = page.locator("#canvas").bounding_box()
    for part in range(1, 20):  # until one lies near enough
        for down in (0.25, 0.5, 0.75):
            page.touchscreen.tap(
                area["x"] + area["width"] * part / 20, area["y"] + area["height"] * down
            )
    assert page.locator("#shown").is_visible()
    context.close()
