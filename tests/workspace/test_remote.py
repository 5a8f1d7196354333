"""OUT on an object store: worked on here, and kept up to date there."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pomona.core.errors import MismatchError, RequestError
from pomona.pipeline.extract import ExtractOptions, extract
from pomona.workspace import layout, remote
from pomona.workspace.lease import LOCK
from pomona.workspace.remote_folder import open_place
from tests.conftest import fill
from tests.faults import KINDS, Plan, Proxy, share
from tests.object_stores import upload
from tests.workspace.conftest import make_out, pomona, put, there, tree, wait_until


def features_of(out: Path) -> dict[str, tuple[Any, ...]]:
    """The table, without the times, which are the store's."""
    files = sorted((out / "features").glob("split=*/*.parquet"))
    rows = [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]
    names = ("label", "filename", "size", "width", "features", "error")
    found = {row["path"]: tuple(row[name] for name in names) for row in rows}
    assert len(found) == len(rows)
    return found


OPTIONS = ExtractOptions(weights="fruits", image_size=32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("storage") / "photos", each=30)


@pytest.fixture(scope="module")
def undisturbed(photos: Path) -> dict[str, tuple[Any, ...]]:
    extract(photos, photos.parent / "plain", OPTIONS)
    return features_of(photos.parent / "plain")


def upload_folder(store: str, bucket: str, folder: Path) -> list[str]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))
    upload(store, bucket, {name: (folder / name).read_bytes() for name in names})
    return names


@pytest.mark.slow
def test_a_store_under_faults_gives_the_undisturbed_table(
    store: str, through: Proxy, tmp_path: Path, photos: Path, undisturbed: dict[str, Any]
) -> None:
    names = upload_folder(store, "faulty", photos)
    often, lost = share(8), names[7]

    def plan(method: str, path: str, before: int) -> str | None:
        return "internal" if path == f"/faulty/{lost}" else often(method, path, before)

    through.reset(plan)
    record = extract(f"s3://faulty?{through.options}", tmp_path / "out", OPTIONS)
    assert record["rejected"] == {"unreadable": 1}
    assert set(through.faults) == set(KINDS)
    got = features_of(tmp_path / "out")
    assert got.pop(lost)[-2:] == (None, "unreadable")
    assert got == {name: row for name, row in undisturbed.items() if name != lost}
    through.reset()
    again = extract(f"s3://faulty?{through.options}", tmp_path / "out", OPTIONS)
    assert (again["rejected"], again["times"]["computed"]) == ({}, 1)


def part(folder: str, number: int) -> None:
    path = Path(folder, f"_work/parts-0/{number}.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([number]))


def started(folder: str) -> None:
    """What extract leaves before the first part."""
    path = Path(folder, "features/_table.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": 1, "files": {}}))


def test_parts_go_up_as_they_come(bucket: str, through: Proxy) -> None:
    with remote.opened(bucket, source="x") as home:
        started(home.folder)
        part(home.folder, 1)
        wait_until(lambda: "_work/parts-0/1.parquet" in there(bucket))
        assert put(through)[0] == "features/_table.json", "parts without it are nobody's"
        part(home.folder, 2)
        Path(home.folder, "_work/todo.arrow").write_text("made again")
        Path(home.folder, "_work/parts-0/.3.part").write_text("half")
        wait_until(lambda: "_work/parts-0/2.parquet" in there(bucket))
        assert len(there(bucket)) == 3
        # The change at the end of extract isn't seen before it is whole.
        make_out(Path(home.folder))
        part(home.folder, 3)
        wait_until(lambda: "_work/parts-0/3.parquet" in there(bucket))
        assert json.loads(there(bucket)["features/_table.json"])["files"] == {}
        shutil.rmtree(Path(home.folder, "_work"))
        home.after("extract")
        assert there(bucket) == tree(Path(home.folder))
    assert not open_place(bucket).read_json(LOCK)


def test_a_lost_driver_and_a_failed_one(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), remote.opened(bucket, source="x") as home:
        started(home.folder)
        part(home.folder, 1)
        raise KeyboardInterrupt
    assert "_work/parts-0/1.parquet" in there(bucket)
    shutil.rmtree(tmp_path / "cache")
    with remote.opened(bucket, source="x") as home:
        assert Path(home.folder, "_work/parts-0/1.parquet").read_bytes() == b"\1"
        make_out(Path(home.folder))
        shutil.rmtree(Path(home.folder, "_work"))
    assert there(bucket) == tree(Path(home.folder))


def test_the_store_is_what_counts(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with remote.opened(bucket, source="x") as home:
        make_out(Path(home.folder), "first")
    mine = home.folder
    # Another machine goes on.
    monkeypatch.setenv("POMONA_CACHE", str(tmp_path / "another"))
    with remote.opened(bucket) as home:
        assert home.folder != mine
        assert tree(Path(home.folder)) == tree(Path(mine))
        Path(home.folder, "manifest.json").write_text('{"new": 1}')
        Path(home.folder, "model/model.onnx").unlink()
    monkeypatch.setenv("POMONA_CACHE", str(tmp_path / "cache"))
    with remote.opened(bucket, look_only=True) as home:
        assert tree(Path(mine)) == there(bucket)
    # Somebody removes all of it, to start anew.
    place = open_place(bucket)
    for name in place.sizes():
        place.delete(name)
    with pytest.raises(RequestError, match="nothing of Pomona's"), remote.opened(bucket):
        pass
    with remote.opened(bucket, source="x") as home:
        assert not tree(Path(home.folder))


def test_who_looks_sees_what_a_running_writer_has_pushed_since(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with remote.opened(bucket, source="x") as home:
        make_out(Path(home.folder))
        home.after("extract")
        monkeypatch.setenv("POMONA_CACHE", str(tmp_path / "another"))
        with remote.opened(bucket, look_only=True) as other:
            assert tree(Path(other.folder)) == tree(Path(home.folder))
        Path(home.folder, "manifest.json").write_text('{"new": 1}')
        home.after("train")
        with remote.opened(bucket, look_only=True) as other:
            assert tree(Path(other.folder)) == tree(Path(home.folder))


def test_files_without_a_record_are_taken(bucket: str, tmp_path: Path) -> None:
    """As another program copied them."""
    place = open_place(bucket)
    for name, content in tree(make_out(tmp_path / "out")).items():
        place.write_bytes(name, content)
    with remote.opened(bucket) as home:
        assert tree(Path(home.folder)) == tree(tmp_path / "out")


def test_errors_name_the_place_and_leave_nothing(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(RequestError, match=r"s3://bucket/\w+/out is bad"),
        remote.opened(bucket, source="x") as home,
    ):
        raise RequestError(f"{home.folder} is bad")
    assert not Path(home.folder).exists()
    assert not open_place(bucket).sizes()
    nobody = bucket.replace("//bucket", "//nobody")
    with (
        pytest.raises(RequestError, match="NO_SUCH_BUCKET"),
        remote.opened(nobody, source="x"),
    ):
        pass
    assert not list((tmp_path / "cache" / "out").iterdir())
    for source, out in (("s3://b/p", "s3://b/p/out"), ("s3://b/p/photos", "s3://b/p")):
        with (
            pytest.raises(RequestError, match="lie in one another"),
            remote.opened(out, source=source),
        ):
            pass


def test_who_looks_leaves_the_folder_of_a_live_run(bucket: str) -> None:
    """Which lists its source, and has nothing to show yet."""
    with remote.opened(bucket, source="x") as home:
        out = layout.open_out(home.folder)
        with layout.lock(out):
            out.places.write_text('{"format": 1}')
            with remote.opened(bucket, look_only=True) as other:
                assert (other.folder, other.running) == (home.folder, True)
            assert out.places.exists()
    assert not out.root.exists(), "nothing came of it"


def slow(seconds: float, name: str) -> Plan:
    """Photos come slowly, so that a run can be caught in the middle."""

    def plan(method: str, path: str, before: int) -> str | None:
        if method == "GET" and path.startswith(name):
            time.sleep(seconds)
        return None

    return plan


def parts_at(place: str) -> set[str]:
    return {name for name in open_place(place).sizes() if "/parts-" in name}


@pytest.mark.slow
def test_a_run_that_lost_its_driver(
    store: str,
    bucket: str,
    through: Proxy,
    tmp_path: Path,
    photos: Path,
    undisturbed: dict[str, Any],
) -> None:
    names = upload_folder(store, "slowly", photos)
    words = ["run", f"s3://slowly?{through.options}", "--out", bucket, "--weights", "fruits"]
    words += ["--image-size", "32", "--master", "local[2]", "--json"]
    words += ["--components", "4", "--no-mlflow", "--no-plots"]
    through.reset(slow(1.0, "/slowly/"))
    process = pomona(*words)
    try:
        wait_until(lambda: parts_at(bucket), what=process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    shutil.rmtree(tmp_path / "cache")  # the driver's disk
    told = json.loads(pomona("status", "--out", bucket, "--json").communicate()[0])
    assert told["photos"] == len(names)
    assert 0 < told["done"] < len(names)
    through.reset()
    output, errors = (process := pomona(*words)).communicate(timeout=600)
    assert process.returncode == 0, errors
    computed = json.loads(output)["extract"]["times"]["computed"]
    assert computed == len(names) - told["done"]
    remote.pull(bucket, tmp_path / "back")
    assert features_of(tmp_path / "back") == undisturbed
    assert not parts_at(bucket)
    model = bucket.replace("/out?", "/out/model?")
    process = pomona("predict", str(photos / "Test" / "Fruit 0"), "--model", model, "--json")
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, len(output.splitlines())) == (0, 30), errors


def test_a_model_that_is_damaged_or_absent(bucket: str, tmp_path: Path) -> None:
    from pomona.model import artifact

    uri = bucket.replace("/out?", "/out/model?")
    with pytest.raises(RequestError, match="there is no model in s3://"):
        remote.fetch_model(uri)
    remote.push(make_out(tmp_path / "out"), bucket)
    open_place(bucket).write_bytes("model/classifier.safetensors", b"x")
    with pytest.raises(MismatchError):
        artifact.load_model(remote.fetch_model(uri))


@pytest.mark.parametrize("name", ["model.json", "model.onnx", "classifier.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "one byte"])
def test_a_damaged_model_in_the_cache_is_fetched_again(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    from pomona.model import artifact
    from tests.broken_models import whole

    monkeypatch.setenv("POMONA_CACHE", str(tmp_path / "cache"))
    for file in whole(tmp_path / "model").iterdir():
        open_place(bucket).write_bytes(f"model/{file.name}", file.read_bytes())
    uri = bucket.replace("/out?", "/out/model?")
    folder = remote.fetch_model(uri)
    right = (folder / name).read_bytes()
    (folder / name).write_bytes(b"" if damage == "empty" else right[:-1] + b"?")
    assert remote.fetch_model(uri) == folder
    assert (folder / name).read_bytes() == right
    artifact.load_model(folder)


def test_a_signature_comes_with_the_model_and_goes_with_it(bucket: str, tmp_path: Path) -> None:
    from tests.broken_models import whole

    for file in whole(tmp_path / "model").iterdir():
        open_place(bucket).write_bytes(f"model/{file.name}", file.read_bytes())
    uri = bucket.replace("/out?", "/out/model?")
    assert not (remote.fetch_model(uri) / "model.sig").exists()
    open_place(bucket).write_bytes("model/model.sig", b"signed")
    assert (remote.fetch_model(uri) / "model.sig").read_bytes() == b"signed"
    open_place(bucket).delete("model/model.sig")
    assert not (remote.fetch_model(uri) / "model.sig").exists()
