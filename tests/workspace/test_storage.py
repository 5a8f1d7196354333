"""Object stores that fail, OUT copied to them and from them, and OUT that lives there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pomona.cli import spark_job
from pomona.core import object_store
from pomona.core.errors import BusyError, MismatchError, RequestError, SourceError, WeightsError
from pomona.core.object_store import S3_ATTEMPTS, TRIES, connect, is_transient, retrying
from pomona.core.progress import Tick
from pomona.core.uris import refuse_uri
from pomona.photos.listing import list_files
from pomona.photos.reading import read
from pomona.photos.source import Source, arrange, open_source
from pomona.pipeline.extract import ExtractOptions, extract
from pomona.workspace import layout, remote, sync
from pomona.workspace.lease import SILENT, Holder, _whereabouts, held
from pomona.workspace.remote_folder import Place, open_place
from tests.conftest import fill, photo
from tests.faults import KINDS, Plan, Proxy, proxy, share
from tests.photos.test_sources import paths, table, upload

Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def gate(store: str) -> Iterator[Proxy]:
    with proxy(store) as server:
        yield server


@pytest.fixture
def through(gate: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy, with a client that gives a request up after a second."""
    monkeypatch.setattr(object_store, "REQUEST_TIMEOUT", 1.0)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    connect.cache_clear()
    gate.reset()
    yield gate
    gate.reset()
    connect.cache_clear()


def contents_of(source: Source, *names: str) -> dict[str, bytes | None]:
    photos = arrange(table(*names)) if names else None
    photos = photos or arrange(list_files(source).files)
    batches = [b.slice(n, 8) for b in photos.to_batches() for n in range(0, b.num_rows, 8)]
    rows = [row for batch in read(iter(batches), source) for row in batch.to_pylist()]
    return {row["path"]: row["content"] for row in rows}


# --- reading -----------------------------------------------------------------------------------


def test_faults_that_pass_cost_no_photo(store: str, through: Proxy) -> None:
    photos = {f"{n // 16}/{n}.jpg": photo(n, (32, 32)) for n in range(64)}
    upload(store, "flaky", photos)
    through.reset(share(25))
    assert contents_of(open_source(f"s3://flaky?{through.options}")) == photos
    assert set(through.faults) == set(KINDS), "every kind was met"


def test_only_the_key_that_keeps_failing_is_unreadable(
    store: str, through: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "TRIES", 2)
    upload(store, "failing", {"1.jpg": b"x", "2.jpg": b"y"})
    through.reset(lambda _, path, __: "slow down" if path.endswith("/1.jpg") else None)
    found = contents_of(open_source(f"s3://failing?{through.options}"))
    assert found == {"1.jpg": None, "2.jpg": b"y"}
    assert through.asked["HEAD", "/failing/1.jpg"] == 2 * S3_ATTEMPTS, "bounded"


def test_what_cannot_pass_is_asked_once(store: str, through: Proxy) -> None:
    upload(store, "closed", {"1.jpg": b"x", "2.jpg": b"y"})
    through.reset(lambda _, path, __: "denied" if path.endswith("/1.jpg") else None)
    source = open_source(f"s3://closed?{through.options}")
    assert contents_of(source, "1.jpg", "2.jpg", "no.jpg") == {
        "1.jpg": None,
        "2.jpg": b"y",
        "no.jpg": None,
    }
    assert through.asked["HEAD", "/closed/1.jpg"] == 1
    assert through.asked["HEAD", "/closed/no.jpg"] == 1


def test_a_listing_is_tried_again(store: str, through: Proxy) -> None:
    upload(store, "listed", {"a/1.jpg": b"x", "a/2.jpg": b"y"})
    times = S3_ATTEMPTS + 1  # more than the client tries by itself
    through.reset(lambda _, path, n: "internal" if "list-type" in path and n < times else None)
    found = list_files(open_source(f"s3://listed?{through.options}"))
    assert paths(found.files) == ["a/1.jpg", "a/2.jpg"]


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("AWS Error SLOW_DOWN during GetObject operation: Please reduce your request rate.", True),
        ("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response", True),
        ("AWS Error UNKNOWN (HTTP status 429) during HeadObject operation: No response", True),
        ("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 28, Timeout", True),
        ("for key 'NO_SUCH_.jpg' in 'b': AWS Error INTERNAL_FAILURE during GetObject", True),
        ("google::cloud::Status(UNAVAILABLE: Retry policy exhausted", True),
        ("AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation", False),
        ("AWS Error INVALID_ACCESS_KEY_ID during ListObjectsV2 operation", False),
        ("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response", False),
        ("AWS Error UNKNOWN (HTTP status 301) during HeadObject operation: No response", False),
        ("google::cloud::Status(PERMISSION_DENIED: Permanent error", False),
    ],
)
def test_what_may_pass(text: str, passes: bool) -> None:
    assert is_transient(OSError(text)) is passes


def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pomona.core.object_store.time.sleep", lambda _: None)
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        raise OSError("AWS Error SLOW_DOWN")

    with pytest.raises(OSError, match="SLOW_DOWN"):
        retrying(fail)
    assert len(tries) == TRIES
    monkeypatch.setattr(object_store, "PATIENCE", -1.0)
    with pytest.raises(OSError, match="SLOW_DOWN"):
        retrying(fail)
    assert len(tries) == TRIES + 1


def test_google_is_given_seconds_and_not_a_quarter_of_an_hour() -> None:
    assert connect("gs://anonymous@bucket")
    with pytest.raises(SourceError, match="gs://bucket: Unexpected query parameter"):
        connect("gs://anonymous@bucket?foo=1")


def test_credentials_in_a_uri_are_not_in_its_name() -> None:
    found = open_source("s3://KEY:SECRET@bucket/a@b/c")
    assert (found.root, found.name) == ("bucket/a@b/c", "s3://bucket/a@b/c")
    assert found.store == "s3://KEY:SECRET@bucket"
    assert open_source("s3a://KEY:SECRET@bucket/a").name == "s3a://bucket/a"
    assert open_source("abfss://c@host/a").name == "abfss://c@host/a"
    with pytest.raises(SourceError) as caught:
        connect("s3://KEY:SECRET@bucket?foo=1")
    assert "SECRET" not in str(caught.value)


def test_credentials_are_not_in_what_is_refused(tmp_path: Path) -> None:
    for place in ("s3://KEY:SECRET@b/o", "s3a://KEY:SEC/RET@b/o", "abfss://u:SEC@b/o?sig=SEC"):
        with pytest.raises(RequestError, match=r"not [a-z3]+://b/o: ") as caught:
            refuse_uri(place, "--out")
        assert "SEC" not in str(caught.value)
    for text in ("s3://KEY:SECRET@", "s3://KEY:SECRET@?region=x"):
        with pytest.raises(SourceError, match="names no bucket") as refused:
            open_source(text)
        assert "SECRET" not in str(refused.value)
    with pytest.raises(SourceError, match="s3://b/o has a / in its secret: write %2F"):
        open_source("s3://KEY:SEC/RET@b/o")
    with pytest.raises(SourceError, match="s3://b: Cannot parse URI: 's3://b' due") as odd:
        connect("s3://KEY:SEC RET@b")
    assert "SEC" not in str(odd.value)
    for uri in ("s3://KEY:SECRET@b/w?foo=SECRET", "s3://KEY:SEC RET@b/w"):
        with pytest.raises(WeightsError, match="weights at s3://b/w can't") as weights:
            spark_job._fetch(uri, tmp_path)
        assert "SEC" not in str(weights.value)


def test_credentials_come_from_the_standard_chain(
    store: str, through: Proxy, tmp_path: Path
) -> None:
    upload(store, "signed", {"1.jpg": b"x"})
    file = tmp_path / "credentials"
    lines = "[{}]\naws_access_key_id = {}\naws_secret_access_key = s\n"
    file.write_text(lines.format("default", "FILE") + lines.format("other", "OTHER"))
    uri = f"s3://signed?{through.options}"
    code = (
        "from pomona.photos.listing import list_files\n"
        "from pomona.photos.source import open_source\n"
        f"print(list_files(open_source({uri!r})).files)"
    )
    bare = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    bare |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    profile = {"AWS_SHARED_CREDENTIALS_FILE": str(file)}
    keys = {"AWS_ACCESS_KEY_ID": "ENV", "AWS_SECRET_ACCESS_KEY": "s"}
    for given, user in (
        (profile, "FILE"),
        ({**profile, "AWS_PROFILE": "other"}, "OTHER"),
        ({**profile, **keys}, "ENV"),
    ):
        through.reset()
        subprocess.run([sys.executable, "-c", code], env={**bare, **given}, check=True, timeout=60)
        assert through.users == {user}


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
def undisturbed(photos: Path, spark: Any) -> dict[str, tuple[Any, ...]]:
    extract(photos, photos.parent / "plain", OPTIONS)
    return features_of(photos.parent / "plain")


def upload_folder(store: str, bucket: str, folder: Path) -> list[str]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))
    upload(store, bucket, {name: (folder / name).read_bytes() for name in names})
    return names


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


# --- push and pull -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _in_haste(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, seconds in (("SETTLE", 0.0), ("SILENT", 1.0), ("REFRESH", 0.1), ("PUSH_EVERY", 0.1)):
        monkeypatch.setattr(remote, name, seconds)
    monkeypatch.setenv("POMONA_CACHE", str(tmp_path / "cache"))


def make_out(root: Path, salt: str = "") -> Path:
    """A finished OUT, as far as copying can tell."""
    files = {
        "features/split=Test/part-00000-00000.parquet": f"test {salt}",
        "features/split=Training/part-00000-00000.parquet": "training",
        "training_pca/label=50%25 é/part-00000.parquet": "pca",
        "model/model.onnx": "onnx",
        "model/model.json": "{}",
        "manifest.json": json.dumps({"format": 1, "salt": salt}),
        "features/_table.json": json.dumps({"format": 1, "files": {"x": {}}, "source": "s"}),
        ".lock": "",
        "_work/leftover": "x",
    }
    for name, text in files.items():
        write(root / name, text)
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def tree(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(".") and "_work" not in path.parts
    }


@pytest.fixture
def bucket(store: str, through: Proxy, tmp_path: Path) -> str:
    """A new prefix, through the proxy."""
    upload(store, "bucket", {})
    name = hashlib.sha256(str(tmp_path).encode()).hexdigest()[:8]
    return f"s3://bucket/{name}/out?{through.options}"


def there(place: str) -> dict[str, bytes]:
    found = open_place(place)
    own = (sync.RECORD, sync.LOCK)
    return {name: found.read_bytes(name) for name in found.sizes() if name not in own}


def put(gate: Proxy) -> list[str]:
    """Names that were written, in order, without the bookkeeping."""
    found = [path.split("/out/")[1] for m, path in gate.log if m == "PUT" and "/out/" in path]
    return [name for name in found if name and not name.startswith(("_push", "_lock"))]


@pytest.mark.parametrize("kind", ["store", "folder"])
def test_push_copies_what_is_not_there_and_removes_what_it_put(
    bucket: str, tmp_path: Path, kind: str
) -> None:
    out = make_out(tmp_path / "out")
    place = bucket if kind == "store" else str(tmp_path / "else" / "where")
    first = remote.push(out, place)
    assert (first["uploaded"], first["deleted"], first["files"]) == (7, 0, 7)
    assert there(place) == tree(out)
    open_place(place).write_bytes("notes/mine.txt", b"somebody's")
    assert remote.push(out, place)["uploaded"] == 0
    (out / "model" / "model.onnx").write_text("ONNX")
    (out / "training_pca" / "label=50%25 é" / "part-00000.parquet").unlink()
    third = remote.push(out, place)
    assert (third["uploaded"], third["deleted"]) == (1, 1)
    found = there(place)
    assert found.pop("notes/mine.txt") == b"somebody's"
    assert found == tree(out)


def test_a_manifest_never_speaks_of_files_that_are_not_there(
    bucket: str, through: Proxy, tmp_path: Path
) -> None:
    out = make_out(tmp_path / "out")
    remote.push(out, bucket)
    assert put(through)[-1] == "manifest.json"
    assert set(put(through)[-3:-1]) == {"features/_table.json", "model/model.json"}
    through.reset()
    (out / "features/split=Test/part-00000-00000.parquet").rename(out / "features/new.parquet")
    (out / "manifest.json").write_text("{}")
    remote.push(out, bucket)
    names = [path.rsplit("/out/")[-1] for _, path in through.log]
    order = [names.index(n) for n in ("features/new.parquet", "manifest.json")]
    deleted = [
        n for n, (m, path) in enumerate(through.log) if m == "DELETE" and "_lock" not in path
    ]
    assert order == sorted(order)
    assert len(deleted) == 1
    assert deleted[0] > order[1]


def pomona(*words: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pomona", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )


def wait_until(true: Callable[[], Any], seconds: float = 90, what: Any = None) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        assert what is None or what.poll() is None, what.communicate()
        time.sleep(0.2)


def test_a_push_that_is_killed_goes_on(bucket: str, through: Proxy, tmp_path: Path) -> None:
    out = make_out(tmp_path / "out")
    for n in range(20):
        (out / "features" / f"{n}.parquet").write_bytes(bytes([n]) * 1000)
    stuck = "features/_table.json"
    through.reset(lambda m, path, _: "hang" if m == "PUT" and path.endswith(stuck) else None)
    process = pomona("push", str(out), bucket)
    wait_until(lambda: through.faults["hang"], what=process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    through.reset()
    assert "manifest.json" not in there(bucket)
    (
        out / "features" / "3.parquet"
    ).unlink()  # it was put there, though the record was never closed
    record = remote.push(out, bucket)
    assert there(bucket) == tree(out)
    assert record["deleted"] == 1


def test_a_push_that_failed_sends_the_rest(bucket: str, through: Proxy, tmp_path: Path) -> None:
    out = make_out(tmp_path / "out")
    through.reset(lambda m, path, _: "denied" if m == "PUT" and "model.json" in path else None)
    with pytest.raises(RequestError, match=r"can't be written.*ACCESS_DENIED"):
        remote.push(out, bucket)
    through.reset()
    assert remote.push(out, bucket)["uploaded"] <= 3
    assert put(through)[-1] == "manifest.json"


def test_what_is_going_comes_back_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A push that was killed before its removals goes on from another machine's copy."""
    out, place, back = make_out(tmp_path / "out"), str(tmp_path / "place"), tmp_path / "back"
    remote.push(out, place)
    (out / "manifest.json").write_text('{"new": 1}')
    gone = "features/split=Test/part-00000-00000.parquet"
    (out / gone).unlink()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sync.Mirror, "_delete", die)
        with pytest.raises(KeyboardInterrupt):
            remote.push(out, place)
    Path(place, sync.LOCK).unlink(missing_ok=True)
    assert gone in there(place)
    remote.pull(place, back)
    assert tree(back) == tree(out)
    assert remote.push(back, place)["deleted"] == 1
    assert there(place) == tree(out)
    assert "going" not in json.loads(Path(place, sync.RECORD).read_text())
    # What is put there again isn't going.
    write(back / gone, "again")
    remote.push(back, place)
    assert there(place) == tree(back)


def test_push_through_faults(bucket: str, through: Proxy, tmp_path: Path) -> None:
    out = make_out(tmp_path / "out")
    through.reset(share(30, ("slow down", "internal", "reset")))
    remote.push(out, bucket)
    remote.pull(bucket, tmp_path / "back")
    assert through.faults
    assert tree(tmp_path / "back") == tree(out)


def test_a_record_that_is_lost_or_stale(bucket: str, tmp_path: Path) -> None:
    out = make_out(tmp_path / "out")
    remote.push(out, bucket)
    place = open_place(bucket)
    place.delete("model/model.onnx")
    place.write_bytes("model/model.json", b"longer")
    assert remote.push(out, bucket)["uploaded"] == 2
    place.write_bytes(sync.RECORD, b"{damaged")
    (out / "features/split=Test/part-00000-00000.parquet").unlink()
    record = remote.push(out, bucket)
    assert (record["uploaded"], record["deleted"]) == (6, 0)
    found = there(bucket)
    assert found.pop("features/split=Test/part-00000-00000.parquet"), "no record, no removal"
    assert found == tree(out)


def test_what_another_out_pushed_is_kept(bucket: str, tmp_path: Path) -> None:
    remote.push(make_out(tmp_path / "a", "a"), bucket)
    other = make_out(tmp_path / "b", "b")
    with pytest.raises(RequestError, match="--replace"):
        remote.push(other, bucket)
    assert there(bucket) == tree(tmp_path / "a")
    remote.push(other, bucket, replace=True)
    assert there(bucket) == tree(other)
    with pytest.raises(RequestError, match="another machine since"):
        remote.push(tmp_path / "a", bucket)
    shutil.copytree(other, tmp_path / "copy", ignore=shutil.ignore_patterns(".places.json"))
    assert remote.push(tmp_path / "copy", bucket, replace=True)["uploaded"] == 0
    assert remote.push(tmp_path / "copy", bucket)["uploaded"] == 0, "it is its own now"


def test_push_takes_only_a_finished_out(tmp_path: Path) -> None:
    out, place = make_out(tmp_path / "out"), str(tmp_path / "place")
    with layout.lock(layout.Out(out)), pytest.raises(BusyError):
        remote.push(out, place)
    (out / "_work" / "plan.json").write_text("{}")
    with pytest.raises(RequestError, match="isn't finished"):
        remote.push(out, place)
    (tmp_path / "bare").mkdir()
    with pytest.raises(RequestError, match="no results"):
        remote.push(tmp_path / "bare", place)
    with pytest.raises(RequestError, match="lie in one another"):
        remote.push(out, str(out / "export"))
    with pytest.raises(RequestError, match="write s3:// for s3a://"):
        remote.push(out, "s3a://bucket/out")


def test_pull_is_checked_and_follows(bucket: str, tmp_path: Path) -> None:
    out, back = make_out(tmp_path / "out"), tmp_path / "back"
    remote.push(out, bucket)
    assert remote.pull(bucket, back)["downloaded"] == 7
    assert tree(back) == tree(out)
    assert remote.pull(bucket, back)["downloaded"] == 0
    (back / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match=r"notes\.txt, which .* doesn't know"):
        remote.pull(bucket, back)
    (back / "notes.txt").unlink()
    (out / "model" / "model.onnx").unlink()
    (out / "rejected.csv").write_text("path")
    remote.push(out, bucket)
    record = remote.pull(bucket, back)
    assert (record["downloaded"], record["deleted"]) == (1, 1)
    assert tree(back) == tree(out)
    open_place(bucket).write_bytes("rejected.csv", b"PATH")
    (back / "rejected.csv").unlink()
    with pytest.raises(RequestError):  # it is gone here
        remote.pull(bucket, back)
    with pytest.raises(MismatchError, match=r"rejected\.csv at .* isn't what was pushed"):
        remote.pull(bucket, tmp_path / "third")
    assert not (tmp_path / "third" / "rejected.csv").exists()


def test_pull_refuses_what_is_not_an_out(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing of Pomona's"):
        remote.pull(bucket, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    remote.push(make_out(tmp_path / "out"), bucket)
    with pytest.raises(RequestError, match="doesn't know"):
        remote.pull(bucket, make_out(tmp_path / "other", "o"))
    Holder(open_place(bucket))._write()
    with pytest.raises(BusyError, match="at work on"):
        remote.pull(bucket, tmp_path / "new")


def test_a_record_leads_nowhere_else(tmp_path: Path) -> None:
    place, back = tmp_path / "place", tmp_path / "deep" / "back"
    remote.push(make_out(tmp_path / "out"), str(place))
    record = json.loads((place / sync.RECORD).read_text())
    entry = record["files"]["manifest.json"]
    for name in ("../evil", "/tmp/evil", "a/../../../evil", ".places.json"):
        record["files"][name] = entry
    (place / sync.RECORD).write_text(json.dumps(record))
    shutil.copy(place / "manifest.json", tmp_path / "evil")
    assert remote.pull(str(place), back)["files"] == 7
    assert not (tmp_path / "deep" / "evil").exists()


# --- one writer --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    return open_place(str(tmp_path / "place"))


def lock_of(place: Place, **about: Any) -> None:
    known = {"id": "other", "pid": 1, "host": "elsewhere", "since": "then"}
    place.write_json(sync.LOCK, {**known, "refreshed": time.time(), **about})


def test_a_living_writer_is_left_alone(folder: Place) -> None:
    with held(folder) as holder:
        holder.me = {**holder.me, "host": "elsewhere"}
        started = time.monotonic()
        with pytest.raises(BusyError, match=r"\(elsewhere, process \d+, since"):
            Holder(folder).acquire()
        assert time.monotonic() - started < SILENT + 1
        holder.refresh()
    assert not folder.read_json(sync.LOCK)


@pytest.mark.parametrize(
    ("about", "waits"),
    [({}, True), ({"refreshed": 0}, False), ({"pid": 2**22 + 1, "here": True}, False)],
    ids=["silent", "ancient", "dead on this machine"],
)
def test_a_dead_writer_is_succeeded(folder: Place, about: dict[str, Any], waits: bool) -> None:
    if about.pop("here", False):
        about |= _whereabouts()
    lock_of(folder, **about)
    started = time.monotonic()
    with held(folder) as holder:
        assert (time.monotonic() - started >= SILENT) == waits
        assert folder.read_json(sync.LOCK)["id"] == holder.me["id"]


def test_a_machine_of_the_same_name_is_another(folder: Place) -> None:
    here = {**_whereabouts(), "pid": 2**22 + 1, "refreshed": time.time()}
    holder = Holder(folder)
    assert holder._is_dead(here)
    one = "boot" if "boot" in here else "card"
    assert not holder._is_dead({**here, one: "another"})
    del here[one]
    assert not holder._is_dead(here), "as an older Pomona wrote it"


def test_who_lost_the_lock_stops(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(BusyError, match="elsewhere"), remote.opened(bucket, source="x") as home:
        make_out(Path(home.folder))
        lock_of(open_place(bucket))
        home.after("extract")
    assert open_place(bucket).read_json(sync.LOCK)["id"] == "other"
    assert not there(bucket)


def test_who_lost_the_lock_stops_within_the_stage(bucket: str) -> None:
    ticks: list[Tick] = []

    def a_long_stage(home: remote.Home) -> None:
        on_tick = home.ticks(ticks.append)
        on_tick(Tick("extract", 1, 9))
        lock_of(open_place(bucket))
        wait_until(lambda: on_tick(Tick("extract", 2, 9)), 10)

    with pytest.raises(BusyError, match="elsewhere"), remote.opened(bucket, source="x") as home:
        a_long_stage(home)
    assert ticks[0].done == 1
    plain = remote.Home("out", "out").ticks(ticks.append)
    plain(Tick("extract", 3, 9))
    assert ticks[-1].done == 3


# --- OUT on an object store --------------------------------------------------------------------


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
        wait_until(lambda: "_work/parts-0/1.parquet" in there(bucket), 10)
        assert put(through)[0] == "features/_table.json", "parts without it are nobody's"
        part(home.folder, 2)
        Path(home.folder, "_work/todo.arrow").write_text("made again")
        Path(home.folder, "_work/parts-0/.3.part").write_text("half")
        wait_until(lambda: "_work/parts-0/2.parquet" in there(bucket), 10)
        assert len(there(bucket)) == 3
        # The change at the end of extract isn't seen before it is whole.
        make_out(Path(home.folder))
        part(home.folder, 3)
        wait_until(lambda: "_work/parts-0/3.parquet" in there(bucket), 10)
        assert json.loads(there(bucket)["features/_table.json"])["files"] == {}
        shutil.rmtree(Path(home.folder, "_work"))
        home.after("extract")
        assert there(bucket) == tree(Path(home.folder))
    assert not open_place(bucket).read_json(sync.LOCK)


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
    output, errors = (process := pomona(*words)).communicate(timeout=300)
    assert process.returncode == 0, errors
    computed = json.loads(output)["extract"]["times"]["computed"]
    assert computed == len(names) - told["done"]
    remote.pull(bucket, tmp_path / "back")
    assert features_of(tmp_path / "back") == undisturbed
    assert not parts_at(bucket)
    model = bucket.replace("/out?", "/out/model?")
    process = pomona("predict", str(photos / "Test" / "Fruit 0"), "--model", model, "--json")
    output, errors = process.communicate(timeout=60)
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


# --- the command line --------------------------------------------------------------------------


def test_the_commands(bucket: str, tmp_path: Path) -> None:
    out, back = str(make_out(tmp_path / "out")), str(tmp_path / "back")
    for words, code, said in (
        (("push", out, bucket, "--json"), 0, '"uploaded": 7'),
        (("pull", bucket, back), 0, "downloaded  7, 0.0 MB"),
        (("push", str(make_out(tmp_path / "b", "b")), bucket), 2, "add --replace"),
        (("pull", bucket.replace("/out?", "/no?"), str(tmp_path / "no")), 2, "nothing of Pomona's"),
    ):
        process = pomona(*words)
        told, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert said in (errors if code else told)
        assert "Traceback" not in errors


def test_many_at_once_keep_the_record_whole(tmp_path: Path) -> None:
    out = make_out(tmp_path / "out")
    for n in range(300):
        (out / "features" / f"{n}.parquet").write_bytes(bytes([n % 256]) * n)
    remote.push(out, str(tmp_path / "place"))
    record = json.loads((tmp_path / "place" / sync.RECORD).read_text())["files"]
    assert {name: entry["sha256"] for name, entry in record.items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in tree(out).items()
    }
