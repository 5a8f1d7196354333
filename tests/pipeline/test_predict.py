from __future__ import annotations

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pyarrow.parquet as pq
import pytest

from pomona.cli import main
from pomona.core.errors import MismatchError, RequestError, SourceError
from pomona.model import artifact
from pomona.model.artifact import Model
from pomona.photos import isolation
from pomona.pipeline import predict as predict_module
from pomona.pipeline import programs
from pomona.pipeline.predict import ROWS, PredictOptions, predict
from pomona.spark.session import Cluster
from tests.conftest import photo
from tests.photos.test_isolation import worse
from tests.small_model import save_small_model

pytest.importorskip("sklearn")

CPU = PredictOptions(device="cpu")


@pytest.fixture(scope="module")
def found(features: Any, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("predict") / "model"
    return artifact.load_model(save_small_model(folder, features))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "photos"
    for n in range(12):
        path = place / f"kind {n % 2}" / f"é {n:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(n))
    (place / "kind 0" / "broken.jpg").write_bytes(photo(1)[:200])
    (place / "notes.txt").write_text("no photo")
    return place


def rows_of(arguments: list[Any], found: Model, options: PredictOptions = CPU) -> list[Any]:
    rows: list[Any] = []
    words = [str(argument) for argument in arguments]
    predict(words, found, options, on_answers=lambda batch: rows.extend(batch.to_pylist()))
    return rows


def test_photos_folders_and_their_order(found: Model, folder: Path) -> None:
    one = folder / "kind 1" / "é 01.jpg"
    rows = rows_of([one, folder, one], found)
    assert len(rows) == 15
    assert rows[0]["path"] == rows[-1]["path"] == str(one)
    inside = [row["path"] for row in rows[1:-1]]
    assert inside == sorted(inside)
    assert {row["error"] for row in rows} == {None, "truncated"}
    same = [row for row in rows if row["path"] == str(one)]
    assert same[0] == same[1] == same[2]


def test_a_photo_that_kills_the_decoder_costs_itself(
    found: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Spark nobody else would go on."""
    monkeypatch.setattr(isolation, "_own", threading.local())  # no child yet
    monkeypatch.setattr(isolation, "_serve", worse)
    for name, content in {"a.jpg": photo(1), "b.jpg": b"crash", "c.jpg": photo(2)}.items():
        (tmp_path / name).write_bytes(content)
    assert [row["error"] for row in rows_of([tmp_path], found)] == [None, "crashed", None]
    answers = programs.predict([photo(1), b"crash"], found)
    assert [row["error"] for row in answers] == [None, "crashed"]


def test_standard_input(found: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = folder / "kind 1" / "é 01.jpg"
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(one.read_bytes())))
    (row,) = rows_of(["-"], found)
    (wanted,) = rows_of([one], found)
    assert row == {**wanted, "path": "-"}
    with pytest.raises(RequestError, match="read once"):
        rows_of(["-", "-"], found)
    with pytest.raises(RequestError, match="leave --out and --master out"):
        rows_of(["-"], found, replace(CPU, out="x"))


def test_an_object_store(found: Model, folder: Path, store: str) -> None:
    options = dict(pair.split("=", 1) for pair in store.split("&"))
    client = boto3.client("s3", endpoint_url=options["endpoint_override"], region_name="us-east-1")
    client.create_bucket(Bucket="answers")
    for path in folder.rglob("*.jpg"):
        client.put_object(
            Bucket="answers", Key=f"p/{path.relative_to(folder)}", Body=path.read_bytes()
        )
    here = rows_of([folder], found)
    there = rows_of([f"s3://answers/p?{store}"], found)
    assert [row["label"] for row in there] == [row["label"] for row in here]
    assert there[0]["path"] == "s3://answers/p/kind 0/broken.jpg"
    (one,) = rows_of([f"s3://answers/p/kind 1/é 01.jpg?{store}"], found)
    assert one["error"] is None


@pytest.mark.parametrize("master", [None, "local[2]"])
def test_into_files(found: Model, folder: Path, tmp_path: Path, spark: Any, master: Any) -> None:
    out = tmp_path / "answers"
    options = replace(CPU, out=str(out), cluster=Cluster(master))
    record = predict([str(folder)], found, options)
    table = pq.read_table(out)
    assert table.schema.names == ROWS.names
    assert table.to_pylist() == rows_of([folder], found)
    assert record["photos"] == 13
    assert record["rejected"] == {"truncated": 1}
    assert sum(record["labels"].values()) + record["unknown"] == 12
    assert sorted(p.name for p in out.iterdir() if p.name[0] != "_") == ["part-00000.parquet"]


def test_what_is_done_isnt_done_again(
    found: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_module, "PER_TASK", 5)
    options = replace(CPU, out=str(tmp_path / "answers"))
    first = predict([str(folder)], found, options)
    parts = sorted((tmp_path / "answers").glob("part-*"))
    assert len(parts) == 3
    times = [part.stat().st_mtime_ns for part in parts]
    parts[1].unlink()
    again = predict([str(folder)], found, options)
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    after = [part.stat().st_mtime_ns for part in parts]
    assert [a == b for a, b in zip(times, after, strict=True)] == [True, False, True]
    with pytest.raises(MismatchError, match="other photos or of another model"):
        predict([str(folder)], found, replace(options, top=1))
    with pytest.raises(RequestError, match="not an empty folder"):
        predict([str(folder)], found, replace(options, out=str(folder)))


def test_what_cant_be_asked(found: Model, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="there is no"):
        rows_of([folder / "nowhere.jpg"], found)
    with pytest.raises(SourceError, match="holds no photos"):
        rows_of([tmp_path / "empty"], found)
    with pytest.raises(SourceError, match="reads local"):
        rows_of(["hdfs://host/photos"], found)
    with pytest.raises(RequestError, match="predict takes photos"):
        rows_of([], found)
    with pytest.raises(RequestError, match="--top is at least 1"):
        rows_of([folder], found, replace(CPU, top=0))
    with pytest.raises(RequestError, match="13 photos are too many for a table"):
        rows_of([folder], found, replace(CPU, most=10))


# --- the command -------------------------------------------------------------------------------


def run(*arguments: Any, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "pomona", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        check=False,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def test_the_command(found: Model, folder: Path, tmp_path: Path) -> None:
    good = folder / "kind 1" / "é 01.jpg"
    told = run("predict", good, "--model", found.folder, "--json")
    assert (told.returncode, told.stderr) == (0, "")
    row = json.loads(told.stdout)
    assert row["path"] == str(good)
    assert row["model"] == found.version
    assert [set(pair) for pair in row["nearest"]] == [{"label", "probability"}] * 3
    told = run("predict", "-", "--model", found.folder, "--csv", stdin=good.read_bytes())
    (sheet,) = csv.DictReader(io.StringIO(told.stdout))
    assert (sheet["path"], sheet["error"]) == ("-", "")
    assert sheet["label"] == (row["label"] or "")
    bad = run("predict", folder / "kind 0" / "broken.jpg", good, "--model", found.folder)
    assert bad.returncode == 3
    assert "can't be used: truncated" in bad.stdout
    assert "50.0% of the photos can't be used" in bad.stderr


def test_it_needs_no_scikit_learn(found: Model, folder: Path) -> None:
    words = ["predict", str(folder / "kind 1" / "é 01.jpg"), "--model", str(found.folder)]
    code = (
        "import sys; sys.modules.update(sklearn=None, scipy=None, matplotlib=None); "
        f"sys.argv[1:] = {words!r}; from pomona.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_errors_of_the_command(found: Model, folder: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ([folder, "--model", tmp_path / "no"], "there is no model in"),
        ([folder, "--model", found.folder, "--json", "--csv"], "--json or --csv, not both"),
        ([tmp_path / "no.jpg", "--model", found.folder], "give a photo, a folder or a URI"),
    ):
        told = run("predict", *arguments)
        assert told.returncode == 2
        assert words in told.stderr
        assert told.stderr.count("\n") == 1
    shutil.copytree(found.folder, tmp_path / "m")
    (tmp_path / "m" / "model.onnx").write_bytes(b"rm -rf")
    assert "was changed or damaged" in run("predict", folder, "--model", tmp_path / "m").stderr


@pytest.mark.slow
def test_ctrl_c_loses_nothing(found: Model, tmp_path: Path) -> None:
    photos = tmp_path / "many"
    photos.mkdir()
    for n in range(2600):
        (photos / f"{n:04}.jpg").write_bytes(photo(n % 7))
    out = tmp_path / "answers"
    command = [sys.executable, "-m", "pomona", "predict", str(photos), "--model"]
    command += [str(found.folder), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(out.glob("part-*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=600)[1]
    if process.returncode:  # else it was quicker than the signal
        assert process.returncode == main.INTERRUPTED
        assert "run the same command again to go on" in told
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert kept
    done = run(*command[3:], "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["photos"] == 2600
    assert all((out / name).stat().st_mtime_ns == when for name, when in kept.items())
    assert pq.read_table(out).num_rows == 2600
