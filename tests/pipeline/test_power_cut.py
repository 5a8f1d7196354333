"""A power cut at any moment loses nothing that was done, and the same command goes on."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pomona.pipeline.extract import extract
from pomona.pipeline.reduce import ReduceOptions, reduce
from pomona.pipeline.train import train
from pomona.privacy import forget
from pomona.privacy.forget import ForgetOptions
from pomona.registry.publish import publish
from pomona.workspace import layout, tombstones
from tests.conftest import fill
from tests.pipeline.conftest import QUICK, outputs, rows
from tests.power_cut import Disk, Here, cuts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc"),
]

FEW = ReduceOptions(components=5, plots=False)
FORGOTTEN = "Training/Fruit 0/1_100.jpg"


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("extract", "reduce"):
        monkeypatch.setattr(f"pomona.pipeline.{module}.open_engine", lambda *_, **__: Here())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("photos") / "source", each=4)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk" / "out"


def survives(
    out: Path, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch, step: int = 1
) -> None:
    """Cut the power in each moment of an action, do it again, and compare."""
    before = shutil.copytree(out, out.parent.parent / "before") if out.exists() else None
    action()
    whole = outputs(out)
    shutil.rmtree(out)
    if before:
        shutil.copytree(before, out)
    for cut in cuts(out.parent, action, monkeypatch, step):
        action()
        assert outputs(out) == whole, cut


def test_extract(photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []

    def action() -> None:
        computed.append(extract(photos, out, QUICK)["times"]["computed"])

    survives(out, action, monkeypatch)
    # What had been done is kept: after later cuts there is less to do, and nothing after the last.
    assert computed[-1] == 0
    assert any(0 < count < 24 for count in computed)


def test_extract_again_with_changed_photos(
    photos: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(photos, tmp_path / "source"))
    extract(source, out, QUICK)
    (source / "Training" / "Fruit 0" / "1_100.jpg").unlink()
    shutil.copy(
        source / "Test" / "Fruit 1" / "1_100.jpg", source / "Training" / "Fruit 2" / "x.jpg"
    )
    survives(out, lambda: extract(source, out, QUICK), monkeypatch, 2)
    assert len(rows(out)) == 24


def test_reduce(photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(photos, out, QUICK)
    reduce(out, ReduceOptions(components=3, plots=False))
    survives(out, lambda: reduce(out, FEW), monkeypatch, 2)


def test_train(photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    extract(photos, out, QUICK)
    reduce(out, FEW)
    survives(out, lambda: train(out), monkeypatch, 3)


def test_publish(photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that a version names are there for good; MLflow's database sees to itself."""
    pytest.importorskip("sklearn")
    pytest.importorskip("mlflow")
    extract(photos, out, QUICK)
    reduce(out, FEW)
    train(out)
    with monkeypatch.context() as patch:
        disk = Disk(out.parent, patch)
        publish(out)
        disk.check()
        disk.close()
    assert any(path.name == "model.onnx" for path in out.glob("mlflow-artifacts/**/*"))


def test_forget(photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a photo's tombstone is written, it doesn't come back, whatever a power cut takes."""
    extract(photos, out, QUICK)
    reduce(out, FEW)
    quiet = ForgetOptions(rebuild=False)
    for cut in cuts(out.parent, lambda: forget.forget(out, [FORGOTTEN], quiet), monkeypatch, 2):
        held = tombstones.total(layout.open_out(out))
        forget.finish(out)
        extract(photos, out, QUICK)
        if held:
            assert FORGOTTEN not in {row["path"] for row in rows(out)}, cut
        forget.forget(out, [FORGOTTEN], quiet)
        assert FORGOTTEN not in {row["path"] for row in rows(out)}, cut
        assert extract(photos, out, QUICK)["forgotten"] == 1
        assert not tombstones.pending(layout.open_out(out))
