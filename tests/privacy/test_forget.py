"""A forgotten photo leaves nothing in OUT: every file is read, and what is packed is unpacked."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pomona.cli import render
from pomona.core import parquet, schema
from pomona.core.errors import BusyError, RequestError, SourceError
from pomona.core.files import read_json, write_json
from pomona.export import export
from pomona.model import pca_table
from pomona.pipeline.extract import ExtractOptions, extract
from pomona.pipeline.reduce import ReduceOptions
from pomona.pipeline.run import run, track
from pomona.pipeline.status import status
from pomona.pipeline.train import TrainOptions
from pomona.privacy import erase as erase_module
from pomona.privacy import forget, path_patterns
from pomona.privacy.erase import DERIVED
from pomona.privacy.forget import ForgetOptions
from pomona.registry import lineage, publish
from pomona.workspace import feature_table, layout, lease, remote, tombstones
from pomona.workspace.remote_folder import open_place
from tests.conftest import photo
from tests.object_stores import upload

pytest.importorskip("sklearn")
# MLflow and SQLAlchemy warn of each other's deprecations when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUICK = ExtractOptions(weights="fruits", image_size=32, device="cpu", label="top")
K = 10
MAGENTA = (255, 0, 255)
SECRET = (
    "Training/Fruit 0/ann & bob/Zoé Quux-7731.jpg",
    "Training/Fruit 1/cat/portrait'kilo 7732.jpg",
    "Test/Fruit 0/dan/whiskey7733.jpg",
    "Training/Fruit 2/eve/truncated7734.jpg",
    "Training/Fruit 2/eve/gone7735.jpg",
)
"""Photos to forget: their colour is nobody else's, and the last two can't be used."""
MAKE = b"EXIFMAKER7736"
QUIET = ForgetOptions(rebuild=False)


def picture(seed: int, secret: bool = False) -> bytes:
    """A photo with a camera's name, a place and a thumbnail's worth of EXIF."""
    exif = Image.Exif()
    exif[0x010F] = MAKE.decode()
    exif.get_ifd(0x8825).update({1: "N", 2: (47.0, 7.0, 36.0), 29: MAKE.decode()})
    small = np.random.default_rng(seed).integers(0, 200, (8, 8, 3), dtype=np.uint8)
    small[..., 1] = 200  # green, so that magenta is the secret ones' alone
    if secret:
        small[:] = MAGENTA
        small[seed % 8, :2] = (255, 40, 255)
    file = io.BytesIO()
    size = (100, 100)
    Image.fromarray(small).resize(size, Image.Resampling.NEAREST).save(file, "JPEG", exif=exif)
    return file.getvalue()


def write(root: Path, path: str, content: bytes) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(content)


@pytest.fixture(scope="module")
def made(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``source`` and ``out``, a whole run without MLflow."""
    base = tmp_path_factory.mktemp("forget")
    for split in ("Training", "Test"):
        for label in range(3):
            for n in range(8):
                seed = 1000 * label + 10 * n + (split == "Test")
                kind = f"kind {n % 2}"
                write(base / "source", f"{split}/Fruit {label}/{kind}/{n}.jpg", picture(seed))
    for n, path in enumerate(SECRET):
        write(base / "source", path, picture(n, secret=True))
    whole = picture(3, secret=True)
    write(base / "source", SECRET[3], whole[: len(whole) // 2])
    write(base / "source", "Training/Fruit 1/kind 0/broken.jpg", b"no photo")
    (base / "source" / SECRET[4]).unlink()
    (base / "source" / SECRET[4]).symlink_to(base / "nothing")
    options = TrainOptions(unknown="neighbours")
    run(base / "source", base / "out", QUICK, ReduceOptions(K), train_options=options)
    (base / "out" / "pomona.log").write_text(
        f"a line\nWARNING unreadable: {SECRET[4]}: gone\nanother line\n", encoding="utf-8"
    )
    return base


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


# --- everything that lies in OUT ---------------------------------------------------------------


def everything(out: Path) -> Iterator[tuple[str, bytes]]:
    """All bytes of all files, and once more what is packed or escaped in them; names too."""
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = path.relative_to(out).as_posix()
        content = path.read_bytes()
        yield f"name of {name}", name.encode()
        yield name, content
        if path.suffix == ".parquet":
            yield from unpacked(name, path)
        elif path.suffix == ".arrow":
            with pa.OSFile(str(path), "rb") as file:
                yield name, str(pa.ipc.open_file(file).read_all().to_pylist()).encode()
        elif path.suffix == ".json":
            yield name, str(json.loads(content)).encode()
        elif path.suffix == ".html":
            for n, uri in enumerate(re.findall(rb"base64,([A-Za-z0-9+/=]+)", content)):
                yield f"{name}, picture {n}", base64.b64decode(uri)
            for script in re.findall(
                rb'<script type="application/json"[^>]*>(.*?)</script>', content
            ):
                yield name, plain(script)
        elif path.suffix == ".db":
            with sqlite3.connect(path) as database:
                yield name, "\n".join(database.iterdump()).encode()
            database.close()
        elif path.suffix == ".csv":
            numbers = re.findall(rb"-?\d+\.\d+(?:e-?\d+)?", content)
            yield name, np.array(numbers, np.float64).astype(np.float32).tobytes()


def plain(script: bytes) -> bytes:
    """JSON's escapes resolved; the page's own template, in a version's code, is not JSON."""
    try:
        return str(json.loads(script)).encode()
    except ValueError:
        return b""


def unpacked(name: str, path: Path) -> Iterator[tuple[str, bytes]]:
    table = pq.ParquetFile(path).read()
    yield name, str(pq.ParquetFile(path).metadata.to_dict()).encode()
    for column in table.itercolumns():
        if pa.types.is_list(column.type):
            yield name, column.combine_chunks().flatten().to_numpy(zero_copy_only=False).tobytes()
        else:
            yield name, str(column.to_pylist()).encode()


def needles(out: Path) -> dict[str, bytes]:
    """What must not be found: names, features, pca_features."""
    found = {}
    for path in SECRET:
        for form in path_patterns.forms(path) | path_patterns.forms(path.rpartition("/")[2]):
            found[f"name {form}"] = form.encode()
    for row in feature_rows(out):
        if row["path"] in SECRET and row["features"]:
            values = np.array(row["features"], np.float32)
            for start in range(0, 1280, 64):
                window = values[start : start + 8]
                if window.any():
                    found[f"features {row['path']} {start}"] = window.tobytes()
    for name in ("training_pca", "test_pca"):
        photos = pca_table.read_photos(layout.open_out(out), name, 10**6)
        for path, z in zip(photos.paths, photos.z, strict=True):
            if path in SECRET:
                for start in (0, K - 8):
                    found[f"pca {path} {start}"] = z[start : start + 8].tobytes()
                    found[f"pca64 {path} {start}"] = z[start : start + 8].astype(float).tobytes()
    assert len([name for name in found if name.startswith("features")]) >= 30
    return found


def hits(out: Path, wanted: dict[str, bytes]) -> dict[str, str]:
    found = {}
    for name, content in everything(out):
        for what, needle in wanted.items():
            if needle in content:
                found[what] = name
        if ", picture" in name and magenta(content):
            found[f"thumbnail in {name.split(',')[0]}"] = name
    return found


def magenta(content: bytes) -> bool:
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    far = np.abs(pixels - np.array(MAGENTA)).sum(axis=2)
    return bool((far < 150).sum() > 20)


def feature_rows(out: Path) -> list[dict[str, Any]]:
    found = [
        {**row, "split": file.parent.name.split("=")[1]}
        for file in sorted((out / "features").glob("split=*/*.parquet"))
        for row in pq.ParquetFile(file).read().to_pylist()
    ]
    return sorted(found, key=lambda row: str(row["path"]))


def tree(out: Path) -> dict[str, str]:
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def others(out: Path) -> list[dict[str, Any]]:
    return [row for row in feature_rows(out) if row["path"] not in SECRET]


# --- the promise -------------------------------------------------------------------------------


def test_no_byte_is_left(
    made: Path, out: Path, monkeypatch: pytest.MonkeyPatch, spark: Any
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("POMONA_CACHE", str(out.parent / "cache"))
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    records = read_json(out / "manifest.json")["stages"]
    assert "mlflow.db" in track(out, records)
    publish.publish(out)
    export.export(out, export.ExportOptions(half=False))
    note(out, f"see {SECRET[1]}")
    wanted, before = needles(out), others(out)
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

    the_next_runs(made, out, before)
    assert hits(out, wanted) == {}

    # A later forget finds the old version once more, as one that may know the photo; it goes.
    receipt = forget.forget(out, ["Training/Fruit 1/kind 0/0.jpg"], retired())
    (version,) = receipt["models"]
    assert (version["trained_with"], version["retired"]) == ("perhaps", True)
    assert not list((out / "mlflow-artifacts" / "models").glob("*/artifacts"))
    assert lineage.versions(layout.open_out(out), anything(out)) == ([], [])


def the_next_runs(made: Path, out: Path, before: list[dict[str, Any]]) -> None:
    """The counts are right, and the next extract doesn't bring the photos back."""
    found = status(out)
    assert found["photos"] == found["done"] == len(before)
    assert found["rejected"] == {"not_an_image": 1}
    assert found["finished"] == ["extract", "reduce", "train"]
    assert (found["forgotten"], found["forgetting"]) == (5, False)
    record = read_json(out / "manifest.json")["stages"]["extract"]
    assert record["photos"] == len(before)
    assert record["rejected"] == {"not_an_image": 1}
    assert record["splits"] == {"Training": 25, "Test": 24}

    again = extract(made / "source", out, QUICK)
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


def test_exif_is_never_stored(made: Path) -> None:
    source = next((made / "source" / "Training").rglob("0.jpg")).read_bytes()
    assert MAKE in source
    assert b"Exif" in source
    for name, content in everything(made / "out"):
        assert MAKE not in content, name
        if ", picture" in name:
            assert b"Exif" not in content, name
            with Image.open(io.BytesIO(content)) as image:
                assert not image.getexif(), name


# --- killed ------------------------------------------------------------------------------------

DIE = """
import os, sys
from pomona import erasing, forgetting, manifest, tombstones
from pathlib import Path
point, out, photos = sys.argv[1], sys.argv[2], sys.argv[3:]
def die(*_, **__):
    os._exit(9)
kind, number = point.split(":")
count = [0]
def counted(real):
    def call(*a, **k):
        count[0] += 1
        if count[0] == int(number):
            die()
        return real(*a, **k)
    return call
if kind == "move":
    Path.rename = counted(Path.rename)
elif kind == "remove":
    Path.unlink = counted(Path.unlink)
elif kind == "copies":
    erasing.clean_copies = counted(erasing.clean_copies)
elif kind == "stage":
    erasing.stage = counted(erasing.stage)
elif kind == "rebuild":
    forgetting._rebuild = die
forgetting.forget(out, photos, forgetting.ForgetOptions(rebuild=False))
"""
POINTS = ["move:1", "move:2", "copies:1", "stage:1", "move:4", "move:8", "remove:4", "rebuild:1"]


def test_killed_anywhere(out: Path, tmp_path: Path) -> None:
    """The same command ends it, or the next one does; no journal and no staged file has a name."""
    reference = Path(shutil.copytree(out, tmp_path / "reference"))
    wanted = needles(out)
    forget.forget(reference, SECRET, QUIET)
    expected = without_receipts(reference)
    places = [Path(shutil.copytree(out, tmp_path / f"{n}")) for n in range(len(POINTS))]
    running = [start(point, place) for point, place in zip(POINTS, places, strict=True)]
    ends = [(process.communicate(timeout=120)[1], process.returncode) for process in running]
    for number, (point, place) in enumerate(zip(POINTS, places, strict=True)):
        assert ends[number][1] == 9, (point, ends[number])
        for name, content in everything(place):
            if name.startswith(("_work/", "forgotten/")):
                assert not [w for w, needle in wanted.items() if needle in content], (point, name)
        told = forget.finish(place) if number % 2 else None
        assert bool(told) == bool(number % 2)
        told = told or forget.forget(place, SECRET, QUIET)
        assert told["finished"], point
        assert told["photos"] == len(SECRET)
        assert hits(place, wanted) == {}, point
        assert without_receipts(place) == expected, point
        assert not tombstones.pending(layout.open_out(place))
        assert not (place / "_work").exists()


def start(point: str, out: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DIE, point, str(out), *SECRET],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def without_receipts(out: Path) -> dict[str, str]:
    return {name: sha for name, sha in tree(out).items() if not name.startswith("forgotten/")}


def test_a_run_ends_it_first(out: Path, made: Path) -> None:
    process = start("copies:1", out)
    process.communicate(timeout=60)
    with pytest.raises(RequestError, match="pomona forget isn't finished"):
        extract(made / "source", out, QUICK)
    told = subprocess.run(
        [sys.executable, "-m", "pomona", "report", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    # Its rows are gone, and so is what was made from them.
    assert told.returncode in (1, 2), told.stderr
    assert len(feature_rows(out)) == 49
    assert tombstones.pending(layout.open_out(out))["phase"] == "rebuild"
    assert (forget.finish(out) or {})["made_again"] == {}
    assert forget.finish(out) is None


def test_killed_when_only_the_command_knew_a_name(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in no table can't be told from its tombstone: the rest goes on, and it is asked."""
    folder, left = layout.open_out(out), "Training/left7737.jpg"
    answers = write_answers(out, [left, "Training/Fruit 0/kind 0/0.jpg"])
    named, options = [left, SECRET[0]], ForgetOptions(rebuild=False, missing_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(erase_module, "clean_copies", interrupted)
        with pytest.raises(KeyboardInterrupt):
            forget.forget(out, named, options)
    told = forget.finish(out)
    assert told
    assert told["finished"] is None
    assert SECRET[0] not in {row["path"] for row in feature_rows(out)}
    assert pq.read_table(answers)["path"].to_pylist()[0] == left
    assert (status(out)["forgetting"], status(out)["unnamed"]) == (True, 1)
    tombstones.refuse_erasing(folder)  # runs go on
    assert forget.finish(out) is None
    with pytest.raises(RequestError, match=r"1 photos of a forget .* again, with its paths"):
        forget.forget(out)
    with pytest.raises(RequestError, match="matches no photo"):
        forget.forget(out, ["*.nothing"], QUIET)
    other = forget.forget(out, [SECRET[2]], options)
    assert other["finished"]
    assert status(out)["unnamed"] == 1
    again = forget.forget(out, named, options)
    assert again["copies"]["answers"] == 1
    assert pq.read_table(answers).num_rows == 1
    receipts = [json.loads(p.read_text()) for p in (out / "forgotten").glob("receipt-*")]
    assert len(receipts) == 3
    assert all(receipt["finished"] for receipt in receipts)
    assert (status(out)["forgetting"], status(out)["unnamed"]) == (False, 0)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


# --- OUT elsewhere -----------------------------------------------------------------------------


def test_a_store_knows_before_anything_is_made_again(
    out: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    monkeypatch.setenv("POMONA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lease, "SETTLE", 0.0)
    upload(store, "forgets", {})
    uri = f"s3://forgets/out?{store}"
    place = open_place(uri)
    remote.push(out, uri)
    wanted = needles(out)
    assert len(hits(fetched(place, tmp_path / "before"), wanted)) > 30
    seen: list[str] = []

    def erase(*words: Any) -> None:
        assert "forgotten/tombstones.json" in place.sizes()
        seen.append("erase")
        real_erase(*words)

    def rebuild(*words: Any) -> dict[str, Any]:
        assert hits(fetched(place, tmp_path / "after"), wanted) == {}
        assert len(feature_rows(tmp_path / "after")) == 49
        seen.append("rebuild")
        return real_rebuild(*words)

    real_erase, real_rebuild = forget._erase, forget._rebuild
    monkeypatch.setattr(forget, "_erase", erase)
    monkeypatch.setattr(forget, "_rebuild", rebuild)
    assert command("forget", *SECRET, "--out", uri, "--yes", "--no-rebuild")[0] == 0
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


# --- parts of a run that isn't finished --------------------------------------------------------


def test_parts_and_the_list_of_what_is_to_do(out: Path) -> None:
    """As a killed extract leaves them: three photos to do again, of which two are done."""
    folder = layout.open_out(out)
    spec = read_json(folder.table_file)["spec"]
    parts = feature_table.parts_folder(folder, spec)
    parts.mkdir(parents=True)
    wanted, before = needles(out), others(out)
    index = feature_table.index(folder, parts).rows
    mine = index.filter(pa.compute.is_in(index["path"], pa.array(SECRET[:2])))
    done = index.filter(pa.compute.equal(index["path"], "Test/Fruit 0/kind 0/0.jpg"))
    fields = schema.FEATURES_TABLE
    full = [row for row in feature_rows(out) if row["path"] in (SECRET[0], done["path"][0].as_py())]
    values = [{name: row[name] for name in fields.names} for row in full]
    batch = pa.RecordBatch.from_pylist(values, fields)
    feature_table.write_part(feature_table.PartFile(str(parts), "abcd1234"), 3, iter([batch]))
    todo = pa.concat_tables([mine, done]).select(schema.PHOTOS.names)
    parquet.write_chunks(folder.work / "todo.arrow", todo, [0, 3])
    write_json(folder.work / "plan.json", {"photos": 54, "before": 51, "run": "abcd1234"})
    (parts / ".abcd1234-000004-x").write_bytes(SECRET[0].encode())
    (folder.work / "reduce-1").mkdir()
    (folder.work / "reduce-1" / "x.csv").write_text(SECRET[1])
    (folder.features / f".{'0' * 32}.part").write_text(SECRET[1])
    assert status(out)["todo"] == 1

    receipt = forget.forget(out, SECRET)
    assert receipt["rows"]["parts"] == 1
    assert hits(out, wanted) == {}
    assert [p.name for p in parts.iterdir()] == ["abcd1234-000003-1-0.parquet"]
    assert not (folder.work / "todo.arrow").exists()
    assert others(out) == before
    assert receipt["made_again"] == dict.fromkeys(
        ("reduce", "train", "report"), "no: extract isn't finished"
    )
    # 54 less five that are forgotten, two of which were among the three to do.
    plan = read_json(folder.work / "plan.json")
    assert (plan["photos"], plan["before"]) == (49, 48)
    assert status(out)["todo"] == 0


# --- which photos ------------------------------------------------------------------------------


def test_patterns(out: Path) -> None:
    plan = forget.forget(out, ["Training/*/kind 0/[04].jpg"], ForgetOptions(dry_run=True))
    assert plan["photos"] == 6
    plan = forget.forget(out, ["**/7.jpg"], ForgetOptions(dry_run=True))
    assert plan["photos"] == 6
    source = read_json(out / "features" / "_table.json")["source"]
    plan = forget.forget(out, [f"{source}/{SECRET[0]}"], ForgetOptions(dry_run=True))
    assert plan["paths"] == [SECRET[0]]
    for pattern in ("Training/*.jpg", "training/**", "*7.jpg", "[x].jpg", "[", "a[]b"):
        with pytest.raises(RequestError, match=r"matches no photo in .*\*\* crosses folders"):
            forget.forget(out, [pattern], QUIET)
    with pytest.raises(RequestError, match=r"neither in the tables of .* nor in its source"):
        forget.forget(out, [SECRET[0], "Training/no.jpg"], QUIET)
    with pytest.raises(RequestError, match="neither in the tables"):  # a list holds no patterns
        forget.forget(out, [], ForgetOptions(listed=("**/7.jpg",)))
    with pytest.raises(RequestError, match="forget takes photos"):
        forget.forget(out)
    assert not (out / "forgotten").exists()


def test_a_dry_run_changes_nothing(out: Path) -> None:
    before = tree(out)
    plan = forget.forget(out, SECRET, ForgetOptions(dry_run=True))
    assert tree(out) == before
    assert plan["rows"]["features"] == 5
    assert "model" in plan["derived"]


def test_photos_that_were_never_taken_in(out: Path, made: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(made / "source", tmp_path / "moved", symlinks=True))
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
        "forgotten/tombstones.json",
        receipt["file"],
        "pomona.log",
    }
    forget.forget(out, ["Training/nowhere.jpg"], ForgetOptions(missing_ok=True))
    assert status(out)["forgotten"] == 2
    told = extract(source, out, QUICK)
    assert (told["times"]["computed"], told["forgotten"]) == (1, 1)  # one is tried each time
    assert forget.allow(out, [new]) == {"allowed": 1, "tombstones": 1}
    with pytest.raises(RequestError, match="is not forgotten in"):
        forget.allow(out, [new])
    told = extract(source, out, QUICK)
    assert (told["times"]["computed"], told["forgotten"]) == (2, 0)


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


def test_keep_deleted_keeps_no_forgotten_photo(out: Path, made: Path) -> None:
    """As with tombstones that were copied from another OUT: the row is still there."""
    folder = layout.open_out(out)
    tombstones.write(tombstones.place(folder), tombstones.read(folder).having([SECRET[0]]))
    told = extract(made / "source", out, replace(QUICK, keep_deleted=True))
    assert (told["photos"], told["forgotten"]) == (53, 1)
    assert SECRET[0] not in {row["path"] for row in feature_rows(out)}


def test_all_photos_are_forgotten(out: Path, made: Path) -> None:
    receipt = forget.forget(out, ["**"])
    assert receipt["photos"] == receipt["rows"]["features"] == 54
    assert receipt["made_again"]["reduce"].startswith("no: there are no features")
    assert feature_rows(out) == []
    assert status(out)["photos"] == 0
    assert status(out)["finished"] == ["extract"]
    with pytest.raises(SourceError, match=r"all 54 photos of .* are forgotten"):
        extract(made / "source", out, QUICK)
    assert model_is_gone(out)


def model_is_gone(out: Path) -> bool:
    return not any((out / name).exists() for name in (*DERIVED, "report/report.html"))


def test_without_rebuild(out: Path) -> None:
    receipt = forget.forget(out, [SECRET[0]], QUIET)
    assert receipt["made_again"] == {}
    assert model_is_gone(out)
    assert status(out)["finished"] == ["extract"]


# --- copies ------------------------------------------------------------------------------------


def test_answers_and_files_of_others(out: Path) -> None:
    shown = [f"../photos/{SECRET[0]}", "../photos/Training/Fruit 0/kind 0/0.jpg"]
    answers = write_answers(out, shown)
    (out / "notes.txt").write_text(f"look at {SECRET[1]}")
    (out / "other.txt").write_text("nothing of it")
    receipt = forget.forget(out, SECRET, QUIET)
    assert pq.read_table(answers)["path"].to_pylist() == shown[1:]
    assert receipt["copies"]["answers"] == 1
    assert receipt["copies"]["left"] == ["notes.txt"]
    text = str(list(render.forgotten(receipt).columns[1].cells))
    assert "notes.txt" in text


def write_answers(out: Path, paths: list[str]) -> Path:
    """As `predict --out` leaves them."""
    write(out, "answers/_answers.json", b"{}")
    file = out / "answers" / "part-00000.parquet"
    pq.write_table(pa.table({"path": paths, "label": ["a", "b"]}), file)
    return file


def test_a_stale_model_goes_too(out: Path) -> None:
    """A photo left the tables earlier; the model that was trained with it is still there."""
    about = read_json(out / "manifest.json")
    about["stages"]["reduce"]["digests"]["training_pca"] = "another"
    write_json(out / "manifest.json", about)
    forget.forget(out, ["Training/left.jpg"], ForgetOptions(rebuild=False, missing_ok=True))
    assert model_is_gone(out)
    assert len(feature_rows(out)) == 54


def test_a_registry_out_of_reach_is_told(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:secret@127.0.0.1:9")
    receipt = forget.forget(out, [SECRET[0]], QUIET)
    assert receipt["models"] == []
    (line,) = receipt["out_of_reach"]
    assert line.startswith("http://127.0.0.1:9: ")
    assert "secret" not in line
    assert forget.forget(out, [SECRET[2]], QUIET)["out_of_reach"] == [], "a Test photo"


def test_the_lock(out: Path) -> None:
    with layout.lock(layout.open_out(out)), pytest.raises(BusyError):
        forget.forget(out, [SECRET[0]], QUIET)
    assert not (out / "forgotten").exists()


def test_names_in_text() -> None:
    names = path_patterns.Names(["a/1.jpg", 'x "q" é.png'], ["1.jpg"])
    assert names.are_in(b"see 1.jpg")
    assert not names.are_in(b"see 21.jpg")
    assert names.are_in(json.dumps('x "q" é.png').encode())
    found = names.pruned(
        {"mistakes": [{"path": "a/1.jpg"}, {"path": "a/2.jpg"}], "n": [1, "1.jpg"]}
    )
    assert found == {"mistakes": [{"path": "a/2.jpg"}], "n": [1]}
    assert not path_patterns.Names([]).are_in(b"anything")
    many = path_patterns.Names([f"{n}.jpg" for n in range(path_patterns.MANY + 1)])
    assert many.are_in(b"other.JPG")
    assert not many.are_in(b"nothing")
    assert many.replaced("see other.jpg") == path_patterns.GONE


# --- the command -------------------------------------------------------------------------------


def pomona(*words: str, typed: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "pomona", "forget", *words],
        input=typed,
        capture_output=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONUTF8": "1"},
    )


def test_the_command(out: Path, tmp_path: Path) -> None:
    told = pomona("--out", str(out), SECRET[0])
    assert told.returncode == 2
    assert b"add --yes" in told.stderr
    assert len(told.stderr.splitlines()) == 1
    lines = "\r\n".join(SECRET).encode()
    told = pomona("--out", str(out), "--list", "-", "--yes", "--no-rebuild", "--json", typed=lines)
    assert told.returncode == 0, told.stderr
    receipt = json.loads(told.stdout)
    assert receipt["photos"] == 5
    assert not any(path.encode() in told.stdout for path in SECRET)
    told = pomona("--out", str(out), "--list", str(tmp_path / "none"), "--yes")
    assert (told.returncode, b"can't be read" in told.stderr) == (2, True)
    told = pomona("--out", str(out), "--allow", SECRET[0])
    assert told.returncode == 0, told.stderr
    assert status(out)["forgotten"] == 4
