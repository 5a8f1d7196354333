"""A forgotten photo leaves nothing in OUT, and isn't taken in again."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pomona.core.errors import BusyError, RequestError, SourceError
from pomona.core.files import read_json, write_json
from pomona.export import export
from pomona.pipeline.extract import extract
from pomona.pipeline.run import track
from pomona.pipeline.status import status
from pomona.privacy import forget
from pomona.privacy.forget import ForgetOptions
from pomona.registry import lineage, publish
from pomona.workspace import feature_table, layout, tombstones
from tests.conftest import photo
from tests.privacy.conftest import MAKE, QUICK, QUIET, SECRET, model_is_gone, others, write
from tests.privacy.leftovers import everything, feature_rows, hits, needles, tree

pytestmark = [
    # MLflow and SQLAlchemy warn of each other's deprecations when they are imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.slow
def test_no_byte_is_left(finished: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("POMONA_CACHE", str(out.parent / "cache"))
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    records = read_json(out / "manifest.json")["stages"]
    assert "mlflow.db" in track(out, records)
    publish.publish(out)
    export.export(out, export.ExportOptions(half=False))
    note(out, f"see {SECRET[1]}")
    wanted, before = needles(out, SECRET), others(out)
    there = hits(out, wanted)
    kinds = {what.split(" ")[0] for what in there}
    assert {"name", "features", "pca", "thumbnail"} <= kinds, "the search finds what is there"
    places = set(there.values())
    assert any(name.startswith("mlflow-artifacts/") for name in places)

    receipt = forget.forget(out, SECRET, ForgetOptions(retire=False))
    assert hits(out, wanted) == {}
    assert receipt["photos"] == receipt["tombstones_added"] == len(SECRET)
    assert receipt["rows"] == {
        "features": 5,
        "parts": 0,
        "rejected.csv": 2,
        "training_pca": 2,
        "test_pca": 1,
        "training_pca_csv": 2,
        "test_pca_csv": 1,
    }
    assert receipt["made_again"] == {"reduce": "yes", "train": "yes", "report": "yes"}
    assert receipt["copies"]["values"] == 1
    assert receipt["copies"]["log_lines"] == 1
    assert (out / "pomona.log").read_text().startswith("a line\nanother line\n")
    assert not (out / "export").exists()
    assert receipt["export_removed"]
    digests = receipt["digests"]
    assert digests["after"]["features"] == feature_table.digest(layout.open_out(out))
    assert set(digests["before"]) == set(digests["after"])
    assert all(digests["before"][name] != digests["after"][name] for name in digests["after"])
    assert others(out) == before == feature_rows(out)
    assert receipt == {**json.loads((out / receipt["file"]).read_text()), "file": receipt["file"]}
    # The version that is published was trained with them, and keeps one as a centre of its own.
    (version,) = receipt["models"]
    assert (version["name"], version["version"], version["trained_with"]) == ("pomona", "1", "yes")
    assert version["aliases"] == ["challenger", "champion"]
    assert version["holds_vector"]
    assert not version["retired"]

    the_next_runs(finished, out, before)
    assert hits(out, wanted) == {}

    # A later forget finds the old version once more, as one that may know the photo; it goes.
    receipt = forget.forget(out, ["Training/Fruit 1/kind 0/0.jpg"], retired())
    (version,) = receipt["models"]
    assert (version["trained_with"], version["retired"]) == ("perhaps", True)
    assert not list((out / "mlflow-artifacts" / "models").glob("*/artifacts"))
    assert lineage.versions(layout.open_out(out), anything(out)) == ([], [])


def the_next_runs(finished: Path, out: Path, before: list[dict[str, Any]]) -> None:
    """The counts are right, and the next extract doesn't bring the photos back."""
    progress = status(out)
    assert progress["photos"] == progress["done"] == len(before)
    assert progress["rejected"] == {"not_an_image": 1}
    assert progress["finished"] == ["extract", "reduce", "train"]
    assert (progress["forgotten"], progress["forgetting"]) == (5, False)
    record = read_json(out / "manifest.json")["stages"]["extract"]
    assert record["photos"] == len(before)
    assert record["rejected"] == {"not_an_image": 1}
    assert record["splits"] == {"Training": 25, "Test": 24}

    again = extract(finished / "source", out, QUICK)
    assert again["times"]["computed"] == 0
    assert again["forgotten"] == 5
    assert feature_rows(out) == before
    assert status(out)["left_out"] == 5


def retired() -> ForgetOptions:
    return ForgetOptions(rebuild=False, retire=True)


def anything(out: Path) -> lineage.Lineage:
    return lineage.Lineage(None, None, "source", True, np.zeros((0, 1280), np.float32))


def note(out: Path, text: str) -> None:
    """Write a note into MLflow's database, and over it, so that a free page holds a name too."""
    with sqlite3.connect(out / "mlflow.db") as database:
        database.execute("pragma secure_delete = off")
        (run,) = database.execute("select run_uuid from runs").fetchone()
        for key, value in (("note", text), ("long", SECRET[0] * 500)):
            database.execute(
                "insert into tags (key, value, run_uuid) values (?, ?, ?)", (key, value, run)
            )
        database.commit()
        database.execute("delete from tags where key = 'long'")
    database.close()
    assert SECRET[0].encode() in (out / "mlflow.db").read_bytes()


def test_exif_is_never_stored(finished: Path) -> None:
    source = next((finished / "source" / "Training").rglob("0.jpg")).read_bytes()
    assert MAKE in source
    assert b"Exif" in source
    for name, content in everything(finished / "out"):
        assert MAKE not in content, name
        if ", picture" in name:
            assert b"Exif" not in content, name
            with Image.open(io.BytesIO(content)) as image:
                assert not image.getexif(), name


def test_a_dry_run_changes_nothing(out: Path) -> None:
    before = tree(out)
    plan = forget.forget(out, SECRET, ForgetOptions(dry_run=True))
    assert tree(out) == before
    assert plan["rows"]["features"] == 5
    assert "model" in plan["derived"]


def test_without_rebuild(out: Path) -> None:
    receipt = forget.forget(out, [SECRET[0]], QUIET)
    assert receipt["made_again"] == {}
    assert model_is_gone(out)
    assert status(out)["finished"] == ["extract"]


def test_a_stale_model_goes_too(out: Path) -> None:
    """A photo left the tables earlier; the model that was trained with it is still there."""
    about = read_json(out / "manifest.json")
    about["stages"]["reduce"]["digests"]["training_pca"] = "another"
    write_json(out / "manifest.json", about)
    forget.forget(out, ["Training/left.jpg"], ForgetOptions(rebuild=False, missing_ok=True))
    assert model_is_gone(out)
    assert len(feature_rows(out)) == 54


def test_all_photos_are_forgotten(out: Path, finished: Path) -> None:
    receipt = forget.forget(out, ["**"])
    assert receipt["photos"] == receipt["rows"]["features"] == 54
    assert receipt["made_again"]["reduce"].startswith("no: there are no features")
    assert feature_rows(out) == []
    assert status(out)["photos"] == 0
    assert status(out)["finished"] == ["extract"]
    with pytest.raises(SourceError, match=r"all 54 photos of .* are forgotten"):
        extract(finished / "source", out, QUICK)
    assert model_is_gone(out)


def test_keep_deleted_keeps_no_forgotten_photo(out: Path, finished: Path) -> None:
    """As with tombstones that were copied from another OUT: the row is still there."""
    folder = layout.open_out(out)
    tombstones.write(folder.root / tombstones.FILES[0], tombstones.read(folder).having([SECRET[0]]))
    record = extract(finished / "source", out, replace(QUICK, keep_deleted=True))
    assert (record["photos"], record["forgotten"]) == (53, 1)
    assert SECRET[0] not in {row["path"] for row in feature_rows(out)}


def test_photos_that_were_never_taken_in(out: Path, finished: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(finished / "source", tmp_path / "moved", symlinks=True))
    folder = layout.open_out(out)
    table = read_json(folder.table_file)
    write_json(folder.table_file, {**table, "source": str(source)})
    new = "Training/Fruit 0/kind 0/new.jpg"
    write(source, new, photo(5))
    before = tree(out)
    receipt = forget.forget(out, [new])
    assert (receipt["photos"], receipt["rows"]["features"]) == (1, 0)
    assert receipt["made_again"] == {}, "nothing was made with it"
    after = tree(out)
    assert {name for name in after if after[name] != before.get(name)} == {
        *tombstones.FILES,
        receipt["file"],
        "pomona.log",
    }
    forget.forget(out, ["Training/nowhere.jpg"], ForgetOptions(missing_ok=True))
    assert status(out)["forgotten"] == 2
    record = extract(source, out, QUICK)
    assert (record["times"]["computed"], record["forgotten"]) == (1, 1)  # one is tried each time
    assert forget.allow(out, [new]) == {"allowed": 1, "tombstones": 1}
    with pytest.raises(RequestError, match="is not forgotten in"):
        forget.allow(out, [new])
    record = extract(source, out, QUICK)
    assert (record["times"]["computed"], record["forgotten"]) == (2, 0)


def test_tombstones_hold_no_path_and_their_key_is_random(out: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(out, tmp_path / "other"))
    for place in (out, other):
        forget.forget(place, [SECRET[0]], QUIET)
    a, b = (json.loads((p / "forgotten/tombstones.json").read_text()) for p in (out, other))
    assert a["ids"] != b["ids"]
    assert len(bytes.fromhex(a["key"])) == 32
    stones = tombstones.read(layout.open_out(out))
    paths = pa.array([*SECRET, "Training/Fruit 0/kind 0/0.jpg"])
    assert stones.held(paths).to_pylist() == [True, *[False] * 5]
    keyed = hashlib.blake2b(SECRET[0].encode(), digest_size=16, key=bytes.fromhex(a["key"]))
    assert a["ids"] == [keyed.hexdigest()]


def test_the_lock(out: Path) -> None:
    with layout.lock(layout.open_out(out)), pytest.raises(BusyError):
        forget.forget(out, [SECRET[0]], QUIET)
    assert not (out / "forgotten").exists()


def test_the_command(
    out: Path, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, stderr = command("forget", "--out", out, SECRET[0])
    assert code == 2
    assert "add --yes" in stderr
    assert len(stderr.splitlines()) == 1
    typed = io.BytesIO("\r\n".join(SECRET).encode())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(typed, encoding="ascii"))
        code, stdout, stderr = command(
            "forget", "--out", out, "--list", "-", "--yes", "--no-rebuild", "--json"
        )
    assert code == 0, stderr
    receipt = json.loads(stdout)
    assert receipt["photos"] == 5
    assert not any(path in stdout for path in SECRET)
    code, _, stderr = command("forget", "--out", out, "--list", tmp_path / "none", "--yes")
    assert (code, "can't be read" in stderr) == (2, True)
    code, _, stderr = command("forget", "--out", out, "--allow", SECRET[0])
    assert code == 0, stderr
    assert status(out)["forgotten"] == 4
