from __future__ import annotations

import contextlib
import functools
import operator
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pomona.core import parquet
from pomona.core.errors import BusyError, JobError, MismatchError
from pomona.core.files import read_json, write_json
from pomona.core.parquet import even_bounds, gather, open_parquet, read_chunk, write_chunks
from pomona.core.schema import FEATURES_TABLE, PHOTOS
from pomona.workspace import compaction, feature_table, layout
from pomona.workspace.compaction import Compaction, WriteFile, commit_compaction, plan_compaction
from pomona.workspace.layout import Out

COMMIT_STEPS = 12
"""File operations of the commit below; one more and nothing is killed."""


def features_batch(names: list[str], split: str = "Training", label: str = "a") -> pa.RecordBatch:
    n = len(names)
    return pa.RecordBatch.from_pylist(
        [
            {
                "path": name,
                "split": split,
                "label": label,
                "filename": name.rsplit("/", 1)[-1],
                "size": 5,
                "modified": 0,
                "width": 1,
                "height": 1,
                "features": [float(hash(name) % 97)] * 1280,
                "error": None,
            }
            for name in names[:n]
        ],
        FEATURES_TABLE,
    )


def photos_of(batch: pa.RecordBatch) -> pa.Table:
    return pa.Table.from_batches([batch]).select(PHOTOS.names)


@pytest.fixture
def out(tmp_path: Path) -> Out:
    found = layout.open_out(tmp_path / "out")
    (found.work / "parts").mkdir(parents=True)
    return found


def put(out: Out, task: int, names: list[str], run: str = "r") -> None:
    part = feature_table.PartFile(str(out.work / "parts"), run)
    feature_table.write_part(part, task, iter([features_batch(names)]))


def compact(out: Out, photos: pa.Table) -> Compaction:
    """What extract does at the end, without Spark."""
    found = feature_table.index(out, out.work / "parts")
    plan = plan_compaction(feature_table.match(photos, found), found)
    staged = out.work / "features"
    chunks = out.work / "c.arrow"
    results = []
    if plan.names:
        write_chunks(chunks, plan.plan, plan.bounds)
        task = WriteFile(
            str(chunks), str(out.root), tuple(found.files), tuple(plan.names), str(staged)
        )
        results = [task(n) for n in range(len(plan.names))]
    commit_compaction(out, plan, results, staged, read_json(out.table_file))
    (out.work / "parts").mkdir(parents=True)
    return plan


def table_paths(out: Out) -> list[str]:
    return [
        p
        for file in sorted(out.features.glob("split=*/*.parquet"))
        for p in pq.ParquetFile(file).read(["path"])["path"].to_pylist()
    ]


def test_parts_become_a_sorted_table(out: Out) -> None:
    names = [f"Training/a/{n:03}.jpg" for n in range(30)]
    put(out, 0, names[::2])
    put(out, 1, names[1::2])
    assert feature_table.count_parts(out.work / "parts") == (30, 0)
    plan = compact(out, photos_of(features_batch(names)))
    assert plan.names == ["split=Training/part-00000-00000.parquet"]
    assert table_paths(out) == names
    (file,) = out.features.glob("split=*/*.parquet")
    values = pq.ParquetFile(file).read(["path", "features"]).to_pylist()
    assert all(row["features"][0] == float(hash(row["path"]) % 97) for row in values)


def test_a_row_twice_is_kept_once(out: Out) -> None:
    names = [f"Training/a/{n}.jpg" for n in range(5)]
    put(out, 0, names)
    put(out, 0, names, run="again")
    compact(out, photos_of(features_batch(names)))
    assert table_paths(out) == names


def test_a_lost_row_is_never_passed_over(out: Out) -> None:
    put(out, 0, ["Training/a/1.jpg"])
    with pytest.raises(JobError, match="1 photos got no row"):
        compact(out, photos_of(features_batch(["Training/a/1.jpg", "Training/a/2.jpg"])))


def test_a_damaged_part_is_done_again(out: Out) -> None:
    put(out, 0, ["Training/a/1.jpg"])
    put(out, 1, ["Training/a/2.jpg"])
    (first, _) = sorted((out.work / "parts").glob("*.parquet"))
    first.write_bytes(first.read_bytes()[:-20])
    found = feature_table.index(out, out.work / "parts")
    assert found.rows["path"].to_pylist() == ["Training/a/2.jpg"]
    assert not first.exists()


def test_a_damaged_table_is_refused(out: Out) -> None:
    put(out, 0, ["Training/a/1.jpg"])
    compact(out, photos_of(features_batch(["Training/a/1.jpg"])))
    (file,) = out.features.glob("split=*/*.parquet")
    file.unlink()
    with pytest.raises(MismatchError, match="missing or damaged"):
        feature_table.index(out, out.work / "parts")


def test_full_files_stay_when_photos_come(out: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "ROWS_PER_FILE", 10)
    names = [f"Training/a/{n:03}.jpg" for n in range(20)]
    put(out, 0, names)
    compact(out, photos_of(features_batch(names)))
    before = {p.name: p.stat().st_mtime_ns for p in out.features.glob("split=*/*.parquet")}
    assert len(before) == 2
    more = [*names, "Training/a/999.jpg"]
    put(out, 0, more[-1:], run="s")
    plan = compact(out, photos_of(features_batch(more)))
    assert plan.plan.num_rows == 1
    after = {p.name: p.stat().st_mtime_ns for p in out.features.glob("split=*/*.parquet")}
    assert before.items() <= after.items()
    assert sorted(table_paths(out)) == more
    fewer = more[5:]
    plan = compact(out, photos_of(features_batch(fewer)))
    assert plan.obsolete == [  # the one that lost rows, and the small one
        "split=Training/part-00000-00000.parquet",
        "split=Training/part-00001-00000.parquet",
    ]
    assert sorted(table_paths(out)) == fewer


def test_nothing_new_changes_nothing(out: Out) -> None:
    names = ["Training/a/1.jpg"]
    put(out, 0, names)
    compact(out, photos_of(features_batch(names)))
    digest = feature_table.digest(out)
    plan = compact(out, photos_of(features_batch(names)))
    assert (plan.names, plan.obsolete) == ([], [])
    assert feature_table.digest(out) == digest


def test_another_label_needs_no_features_again(out: Out) -> None:
    names = ["Training/a/1.jpg", "Training/a/2.jpg"]
    put(out, 0, names)
    compact(out, photos_of(features_batch(names)))
    compact(out, photos_of(features_batch(names, label="b")))
    (file,) = out.features.glob("split=*/*.parquet")
    assert pq.ParquetFile(file).read(["label"])["label"].to_pylist() == ["b", "b"]


def test_deleted_rows(out: Out) -> None:
    names = ["Training/a/1.jpg", "Training/a/2.jpg"]
    put(out, 0, names)
    compact(out, photos_of(features_batch(names)))
    found = feature_table.index(out, out.work / "parts")
    gone = feature_table.deleted(photos_of(features_batch(names[1:])), found)
    assert gone["path"].to_pylist() == names[:1]


@pytest.mark.parametrize("stop_after", range(COMMIT_STEPS + 1))
def test_a_commit_survives_a_kill_at_any_step(
    out: Out, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop at each file operation in turn; the next lock brings the change to its end."""
    names = [f"Training/a/{n}.jpg" for n in range(4)]
    put(out, 0, names[:2])
    compact(out, photos_of(features_batch(names[:2])))
    put(out, 1, names[2:])
    before = feature_table.digest(out)
    steps = 0

    class Killed(BaseException):
        pass

    def counting(operation: Any) -> Any:
        def stepped(*given: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps > stop_after:
                raise Killed
            return operation(*given, **options)

        return stepped

    found = feature_table.index(out, out.work / "parts")
    photos = photos_of(features_batch(names))
    plan = plan_compaction(feature_table.match(photos, found), found)
    staged = out.work / "features-x"
    write_chunks(out.work / "c.arrow", plan.plan, plan.bounds)
    results = [
        WriteFile(
            str(out.work / "c.arrow"),
            str(out.root),
            tuple(found.files),
            tuple(plan.names),
            str(staged),
        )(0)
    ]
    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink"):
            patch.setattr(Path, name, counting(getattr(Path, name)))
        patch.setattr("shutil.rmtree", counting(shutil.rmtree))
        with contextlib.suppress(Killed):
            commit_compaction(out, plan, results, staged, read_json(out.table_file))
    assert (steps > stop_after) == (stop_after < COMMIT_STEPS), steps
    with layout.lock(out):
        assert not out.journal.exists()
    if (
        feature_table.digest(out) == before
    ):  # killed before it was decided: the parts are still there
        compact(out, photos)
    assert sorted(table_paths(out)) == names
    assert feature_table.index(out, out.work / "none").rows.num_rows == 4
    assert not list(out.work.glob("parts-*/*.parquet"))


def test_two_runs_on_one_out(out: Out) -> None:
    with layout.lock(out):
        assert layout.is_locked(out)
        with pytest.raises(BusyError, match="another pomona run"), layout.lock(out):
            pass
    assert not layout.is_locked(out)
    with layout.lock(out):
        pass


def test_row_groups_are_small_whatever_comes(tmp_path: Path) -> None:
    batch = features_batch([f"{n}.jpg" for n in range(50)])
    with open_parquet(tmp_path / "f.parquet", FEATURES_TABLE) as writer:
        for _ in range(50):
            writer.write_batch(batch)
        writer.write_batch(batch.slice(0, 0))
    file = pq.ParquetFile(tmp_path / "f.parquet")
    sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    assert sizes == [
        parquet.ROWS_PER_GROUP,
        parquet.ROWS_PER_GROUP,
        2500 - 2 * parquet.ROWS_PER_GROUP,
    ]


def test_gather_follows_the_plan(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("x", "y"):
        table = pa.table({"v": [f"{name}{n}" for n in range(3000)]})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=700)
    files, places = rng.integers(0, 2, 2500), rng.integers(0, 3000, 2500)
    plan = pa.record_batch({"file": pa.array(files, pa.int32()), "row": pa.array(places)})
    got = [
        v
        for _, part in gather(plan, str(tmp_path), ["x.parquet", "y.parquet"], ["v"])
        for v in part["v"].to_pylist()
    ]
    assert got == [f"{'xy'[f]}{p}" for f, p in zip(files, places, strict=True)]


@pytest.mark.parametrize(("count", "most"), [(0, 3), (1, 3), (3, 3), (4, 3), (100, 7)])
def test_chunks(tmp_path: Path, count: int, most: int) -> None:
    bounds = even_bounds(count, most)
    table = pa.table({"n": pa.array(range(count), pa.int64())})
    write_chunks(tmp_path / "c", table, bounds)
    read = [read_chunk(str(tmp_path / "c"), n)["n"].to_pylist() for n in range(len(bounds) - 1)]
    assert functools.reduce(operator.iadd, read, []) == list(range(count))
    assert all(0 < len(part) <= most for part in read)


def test_written_json_is_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "m.json", {"b": 1, "a": "é"})
    assert (tmp_path / "m.json").read_text() == '{\n  "a": "é",\n  "b": 1\n}\n'
    assert os.listdir(tmp_path) == ["m.json"]  # noqa: PTH208
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(MismatchError, match="damaged"):
        read_json(tmp_path / "m.json")
