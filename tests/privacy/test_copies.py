"""Copies of photos' names: at places, in answers, in files that aren't Pomona's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.csv import write_csv
from pyarrow.fs import FileSystem

from pomona.cli import render
from pomona.cli.work import log_to
from pomona.core.printable import cells
from pomona.privacy import copies, forget, names_in_text
from pomona.privacy.erase import erase_photos, rebuild_derived
from pomona.workspace import lease, remote
from pomona.workspace.feature_table import read_rejected
from pomona.workspace.layout import open_out
from pomona.workspace.remote_folder import open_place
from tests.privacy.conftest import QUIET, SECRET, write, write_answers
from tests.privacy.leftovers import feature_rows, hits, needles

# MLflow and SQLAlchemy warn of each other's deprecations when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_a_store_knows_before_anything_is_made_again(
    out: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    monkeypatch.setenv("POMONA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lease, "SETTLE", 0.0)
    filesystem, bucket = FileSystem.from_uri(f"s3://forgets?{store}&allow_bucket_creation=true")
    filesystem.create_dir(bucket)
    uri = f"s3://forgets/out?{store}"
    place = open_place(uri)
    remote.push(out, uri)
    wanted = needles(out, SECRET)
    assert len(hits(fetched(place, tmp_path / "before"), wanted)) > 30
    seen: list[str] = []

    def erase(*words: Any) -> None:
        assert "forgotten/tombstones.json" in place.sizes()
        seen.append("erase")
        erase_photos(*words)

    def rebuild(*words: Any) -> dict[str, Any]:
        assert hits(fetched(place, tmp_path / "after"), wanted) == {}
        assert len(feature_rows(tmp_path / "after")) == 49
        seen.append("rebuild")
        return rebuild_derived(*words)

    monkeypatch.setattr("pomona.privacy.erase.erase_photos", erase)
    monkeypatch.setattr("pomona.privacy.erase.rebuild_derived", rebuild)
    code, _, stderr = command("forget", "--out", uri, *SECRET, "--yes", "--no-rebuild")
    assert code == 0, stderr
    with remote.opened(uri, look_only=True) as home:
        assert hits(Path(home.folder), wanted) == {}
    assert seen == ["erase", "rebuild"]
    assert "forgotten/pending.json" not in place.sizes()


def fetched(place: Any, folder: Path) -> Path:
    for name in place.sizes():
        place.download(name, folder / name)
    return folder


def test_what_places_are_known_to_hold(out: Path, tmp_path: Path) -> None:
    """Folders of labels that are gone, and files of others that are named like a photo."""
    write(out, "notes/whiskey7733.jpg.txt", b"x")
    remote.push(out, str(tmp_path / "place"))
    remote.pull(str(tmp_path / "place"), tmp_path / "back")
    known = out / ".places.json"
    assert b"label=Fruit 1" in known.read_bytes()
    assert b"whiskey7733" in known.read_bytes()
    receipt = forget.forget(out, ["Training/Fruit 1/**", "Test/Fruit 1/**", SECRET[2]], QUIET)
    assert b"label=Fruit 1" not in known.read_bytes()
    assert b"whiskey7733" not in known.read_bytes()
    assert receipt["copies"]["left"] == ["notes/(forgotten).txt"]
    (out / "notes" / "whiskey7733.jpg.txt").unlink()
    remote.push(out, str(tmp_path / "place"))
    remote.pull(str(tmp_path / "place"), tmp_path / "back")
    for folder in ("place", "back"):
        assert not list((tmp_path / folder).rglob("*whiskey*"))
        assert not list((tmp_path / folder).rglob("label=*"))


def test_answers_and_files_of_others(out: Path) -> None:
    shown = [f"../photos/{SECRET[0]}", "../photos/Training/Fruit 0/kind 0/0.jpg"]
    answers = write_answers(out, shown)
    (out / "notes.txt").write_text(f"look at {SECRET[1]}")
    (out / "other.txt").write_text("nothing of it")
    receipt = forget.forget(out, SECRET, QUIET)
    assert pq.read_table(answers)["path"].to_pylist() == shown[1:]
    assert receipt["copies"]["answers"] == 1
    assert receipt["copies"]["left"] == ["notes.txt"]
    text = str([value for _, value in render.forgotten(receipt)])
    assert "notes.txt" in text


def test_a_registry_out_of_reach_is_told(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:secret@127.0.0.1:9")
    receipt = forget.forget(out, [SECRET[0]], QUIET)
    assert receipt["models"] == []
    (line,) = receipt["out_of_reach"]
    assert line.startswith("http://127.0.0.1:9: ")
    assert "secret" not in line
    assert forget.forget(out, [SECRET[2]], QUIET)["out_of_reach"] == [], "a Test photo"


BROKEN = "Training/Fruit\n2/kiwi\r\x1b[2J.jpg"


def test_a_name_with_line_breaks_goes_from_the_log(tmp_path: Path) -> None:
    """Escaped, in an exception of ours, and as a JVM writes it: over several lines."""
    others = [f"Training/a/{n}.jpg" for n in range(names_in_text.MANY)]
    for number, paths in enumerate(([BROKEN], [BROKEN, *others])):
        out = open_out(tmp_path / str(number))
        with log_to(str(out.root)):
            log = logging.getLogger("pomona")
            log.warning("first")
            log.warning("unreadable: %s", BROKEN)
            log.error("Spark gave up", exc_info=ValueError(f"at {BROKEN}:\nthe end"))
        with out.log.open("ab") as jvm:
            jvm.write(f"WARN {BROKEN} is damaged\nlast\n".encode())
        before = out.log.read_bytes().splitlines()
        names = names_in_text.Names(paths)
        removed = copies._clean_log(out.log, names)
        left = out.log.read_bytes().splitlines()
        assert [line.split()[-1] for line in left] == [b"first", b"up", b"end", b"last"]
        assert removed == len(before) - len(left)
        for part in (b"Fruit", b"kiwi", b"2J"):
            assert part not in out.log.read_bytes()


def test_a_copy_of_rejected_csv_holds_escaped_names(tmp_path: Path) -> None:
    for safe in (False, True):
        paths = [BROKEN, "=kiwi.jpg", "Training/a/other.jpg"]
        shown = cells(pa.array(paths), csv_safe=safe)
        rows = {"path": shown, "split": ["Training"] * 3, "label": shown, "error": ["empty"] * 3}
        write_csv(pa.table(rows), tmp_path / "rejected.csv")
        assert copies._rewrite(tmp_path / "rejected.csv", names_in_text.Names(paths[:2]))
        assert read_rejected(tmp_path / "rejected.csv")["path"].to_pylist() == paths[2:]


def test_names_in_text() -> None:
    names = names_in_text.Names(["a/1.jpg", 'x "q" é.png'], ["1.jpg"])
    assert names.are_in(b"see 1.jpg")
    assert not names.are_in(b"see 21.jpg")
    assert names.are_in(json.dumps('x "q" é.png').encode())
    pruned = names.pruned(
        {"mistakes": [{"path": "a/1.jpg"}, {"path": "a/2.jpg"}], "n": [1, "1.jpg"]}
    )
    assert pruned == {"mistakes": [{"path": "a/2.jpg"}], "n": [1]}
    assert not names_in_text.Names([]).are_in(b"anything")
    many = names_in_text.Names([f"{n}.jpg" for n in range(names_in_text.MANY + 1)])
    assert many.are_in(b"other.JPG")
    assert not many.are_in(b"nothing")
    assert many.replaced("see other.jpg") == names_in_text.GONE
