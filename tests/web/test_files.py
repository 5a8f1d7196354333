"""The page's files, without a browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from pomona.core.errors import MissingError, RequestError
from pomona.export import export
from pomona.export.export import ExportOptions
from pomona.export.phone import page_files
from pomona.model.artifact import Model
from pomona.web import page as page_module
from pomona.web.page import HEADERS, RUNTIME, Site
from tests.web.visitor import needs_runtime

pytest.importorskip("sklearn")


ROOT = Path(__file__).resolve().parents[2]


def text(files: Site, name: str) -> str:
    return files[name].read().decode()


def test_every_address_leads_to_a_file(small: Model) -> None:
    files = page_files(small, service=True)
    page = text(files, "index.html")
    named = re.findall(r"""(?:src|href)="([^"]+)""", page)
    for name, file in files.items():
        if file.media_type.startswith("text/javascript") and "/" not in name:
            source = file.read().decode()
            imports = re.findall(r"from '([^']+)'|new URL\('([^']+)', import", source)
            named += [either or other for either, other in imports]
    named += [icon["src"] for icon in json.loads(text(files, "manifest.webmanifest"))["icons"]]
    assert len(named) > 15
    for name in named:
        assert (name.removeprefix("./") or "index.html") in files, name
        assert not name.startswith(("/", "http"))


def test_nothing_is_inline(small: Model) -> None:
    page = text(page_files(small, service=True), "index.html")
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", page)
    assert "unsafe-inline" not in HEADERS["Content-Security-Policy"]
    assert "'unsafe-eval'" not in HEADERS["Content-Security-Policy"]


def test_what_may_be_kept_and_who_may_have_it(small: Model) -> None:
    needs_runtime()
    files = page_files(small, service=True, needs_key=True)
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
    assert json.loads(text(page_files(small, service=True), "config.json"))["labels"]


def test_the_worker_changes_with_any_file(small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first = page_files(small, service=True)["sw.js"].digest
    assert page_files(small, service=True)["sw.js"].digest == first
    monkeypatch.setattr(page_module, "SHOWN", 2)
    assert page_files(small, service=True)["sw.js"].digest != first


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
    about = json.loads(text(files := page_files(small, service=True), "config.json"))
    assert "on the device: " in caplog.text
    assert about["device"] is False
    assert "make runtime" in about["device_reason"]
    assert not [name for name in files if name.startswith(("runtime/", "device/"))]
    with pytest.raises(MissingError, match=r"no way to answer.*make runtime"):
        page_files(small, service=False)


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
