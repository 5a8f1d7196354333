"""Push and pull: OUT copied to a place, and from there."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from pomona.core.errors import BusyError, MismatchError, RequestError
from pomona.workspace import layout, remote, sync
from pomona.workspace.lease import LOCK, Lease
from pomona.workspace.remote_folder import Place, open_place
from pomona.workspace.sync_state import RECORD
from tests.faults import Proxy, share
from tests.workspace.conftest import make_out, pomona, put, there, tree, wait_until, write


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


def test_a_record_that_could_not_be_written_is_no_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the place has the old record or the new one: both are this OUT's."""
    out, place = make_out(tmp_path / "out"), str(tmp_path / "place")
    remote.push(out, place)
    write_json = Place.write_json
    for arrives in (False, True):
        (out / "manifest.json").write_text(json.dumps({"format": 1, "salt": str(arrives)}))

        def fails(self: Place, name: str, value: object, arrives: bool = arrives) -> None:
            if name != RECORD or arrives:
                write_json(self, name, value)
            if name == RECORD:
                raise OSError("no answer")

        with monkeypatch.context() as patch:
            patch.setattr(Place, "write_json", fails)
            with pytest.raises(RequestError, match="no answer"):
                remote.push(out, place)
        remote.push(out, place)
        assert there(place) == tree(out)


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
        patch.setattr(sync, "_remove", die)
        with pytest.raises(KeyboardInterrupt):
            remote.push(out, place)
    Path(place, LOCK).unlink(missing_ok=True)
    assert gone in there(place)
    remote.pull(place, back)
    assert tree(back) == tree(out)
    assert remote.push(back, place)["deleted"] == 1
    assert there(place) == tree(out)
    assert "going" not in json.loads(Path(place, RECORD).read_text())
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
    place.write_bytes(RECORD, b"{damaged")
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


def test_a_pull_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had fetched came from there, too: it follows later removals."""
    out, place, back = make_out(tmp_path / "out"), str(tmp_path / "place"), tmp_path / "back"
    remote.push(out, place)
    back.mkdir()
    download = Place.download

    def dies(self: Place, name: str, path: Path) -> Any:
        if name == "manifest.json":
            raise KeyboardInterrupt
        return download(self, name, path)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "download", dies)
        with pytest.raises(KeyboardInterrupt):
            remote.pull(place, back)
    assert remote.pull(place, back)["downloaded"] == 1
    (out / "model" / "model.onnx").unlink()
    remote.push(out, place)
    assert remote.pull(place, back)["deleted"] == 1
    assert tree(back) == tree(out)


def test_pull_refuses_what_is_not_an_out(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing of Pomona's"):
        remote.pull(bucket, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    remote.push(make_out(tmp_path / "out"), bucket)
    with pytest.raises(RequestError, match="doesn't know"):
        remote.pull(bucket, make_out(tmp_path / "other", "o"))
    Lease(open_place(bucket))._write()
    with pytest.raises(BusyError, match="at work on"):
        remote.pull(bucket, tmp_path / "new")


def test_a_record_leads_nowhere_else(tmp_path: Path) -> None:
    place, back = tmp_path / "place", tmp_path / "deep" / "back"
    remote.push(make_out(tmp_path / "out"), str(place))
    record = json.loads((place / RECORD).read_text())
    entry = record["files"]["manifest.json"]
    windows = ("C:/evil", "a\\..\\..\\evil")
    for name in ("../evil", "/tmp/evil", "a/../../../evil", ".places.json", *windows):
        record["files"][name] = entry
    (place / RECORD).write_text(json.dumps(record))
    shutil.copy(place / "manifest.json", tmp_path / "evil")
    assert remote.pull(str(place), back)["files"] == 7
    assert not (tmp_path / "deep" / "evil").exists()
    assert not [path for path in back.rglob("*") if "evil" in path.name or path.name == "C:"]


def test_the_commands(bucket: str, tmp_path: Path, command: Any) -> None:
    out, back = str(make_out(tmp_path / "out")), str(tmp_path / "back")
    for words, code, said in (
        (("push", out, bucket, "--json"), 0, '"uploaded": 7'),
        (("pull", bucket, back), 0, "downloaded  7, 0.0 MB"),
        (("push", str(make_out(tmp_path / "b", "b")), bucket), 2, "add --replace"),
        (("pull", bucket.replace("/out?", "/no?"), str(tmp_path / "no")), 2, "nothing of Pomona's"),
    ):
        ended, told, errors = command(*words)
        assert ended == code, errors
        assert said in (errors if code else told)
        assert "Traceback" not in errors


def test_many_at_once_keep_the_record_whole(tmp_path: Path) -> None:
    out = make_out(tmp_path / "out")
    for n in range(300):
        (out / "features" / f"{n}.parquet").write_bytes(bytes([n % 256]) * n)
    remote.push(out, str(tmp_path / "place"))
    record = json.loads((tmp_path / "place" / RECORD).read_text())["files"]
    assert {name: entry["sha256"] for name, entry in record.items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in tree(out).items()
    }
