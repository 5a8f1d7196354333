"""The stage extract on a running Spark session."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pomona.core.errors import BusyError, MismatchError, RequestError, SourceError
from pomona.core.progress import Tick
from pomona.pipeline.extract import ExtractOptions, extract, rejected_share
from pomona.pipeline.status import status
from pomona.workspace import layout
from tests.conftest import fill, photo
from tests.pipeline.conftest import FRUITS as QUICK
from tests.pipeline.conftest import Extracted, outputs, rows


def test_every_photo_has_a_row(source: Path, tmp_path: Path) -> None:
    ticks: list[Tick] = []
    record = extract(source, tmp_path / "out", QUICK, on_tick=ticks.append)
    found = rows(tmp_path / "out")
    assert len(found) == record["photos"] == record["times"]["computed"] == 48
    assert record["splits"] == {"Training": 24, "Test": 24}
    assert {row["label"] for row in found} == {"Fruit 0", "Fruit 1", "Fruit 2"}
    assert all(len(row["features"]) == 1280 for row in found)
    assert {(row["width"], row["height"]) for row in found} == {(100, 100)}
    one = source / found[0]["path"]
    assert found[0]["size"] == one.stat().st_size
    assert abs(found[0]["modified"].timestamp() - one.stat().st_mtime) < 0.002
    assert (ticks[-1].stage, ticks[0].stage) == ("table", "list")
    assert max(t.done for t in ticks if t.stage == "extract") == 48
    assert not (tmp_path / "out" / "_work").exists()


def test_spark_and_a_direct_call_agree(extracted: Extracted) -> None:
    from pomona import MobileNetV2Extractor

    source, out = extracted
    extractor = MobileNetV2Extractor("cpu", weights="fruits", image_size=32)
    found = rows(out)
    direct = extractor.extract_batch([(source / row["path"]).read_bytes() for row in found])
    table = np.array([row["features"] for row in found], np.float32)
    assert np.abs(direct - table).max() <= 1e-5


def test_only_what_is_new_is_computed(extracted: Extracted) -> None:
    source, out = extracted
    before = rows(out)
    assert extract(source, out, QUICK)["times"]["computed"] == 0
    assert rows(out) == before
    (source / "Training/Fruit 0/new.jpg").write_bytes(photo(77))
    (source / "Training/Fruit 9").mkdir()
    (source / "Training/Fruit 9/1.png").write_bytes(photo(78, kind="PNG"))
    assert extract(source, out, QUICK)["times"]["computed"] == 2
    assert len(rows(out)) == 50


def test_a_changed_photo_is_replaced(extracted: Extracted) -> None:
    source, out = extracted
    path = "Training/Fruit 0/0_100.jpg"
    old = next(row for row in rows(out) if row["path"] == path)
    same_size = bytearray((source / path).read_bytes())
    (source / path).write_bytes(photo(991))
    os.utime(source / path, (1, 1_000_000_000))
    assert extract(source, out, QUICK)["times"]["computed"] == 1
    new = next(row for row in rows(out) if row["path"] == path)
    assert new["features"] != old["features"]
    (source / path).write_bytes(same_size)  # its time alone tells
    assert extract(source, out, QUICK)["times"]["computed"] == 1
    assert next(row for row in rows(out) if row["path"] == path)["features"] == old["features"]
    assert len(rows(out)) == 48


def test_deleted_photos_go_or_stay(extracted: Extracted) -> None:
    source, out = extracted
    shutil.rmtree(source / "Training/Fruit 1")
    (source / "Test/Fruit 0/0_100.jpg").unlink()
    kept = ExtractOptions(**{**QUICK.__dict__, "keep_deleted": True})
    assert extract(source, out, kept)["photos"] == 48
    assert len(rows(out)) == 48
    record = extract(source, out, QUICK)
    assert record["photos"] == len(rows(out)) == 48 - 8 - 1
    assert record["times"]["computed"] == 0


def test_another_label_rule_computes_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for split in ("Training", "Test"):
        (source / split / "Kind").mkdir()
        (source / split / "Fruit 0").rename(source / split / "Kind" / "Fruit 0")
    extract(source, out, QUICK)
    top = ExtractOptions(**{**QUICK.__dict__, "label": "top"})
    assert extract(source, out, top)["times"]["computed"] == 0
    labels = {row["path"]: row["label"] for row in rows(out)}
    assert labels["Training/Kind/Fruit 0/0_100.jpg"] == "Kind"


def test_a_test_fraction_splits(tmp_path: Path) -> None:
    source = tmp_path / "flat"
    shutil.copytree(fill(tmp_path / "s", each=20) / "Training", source)
    split = ExtractOptions(**{**QUICK.__dict__, "test_fraction": 0.3})
    record = extract(source, tmp_path / "out", split)
    assert record["splits"]["Training"] + record["splits"]["Test"] == 60
    assert 8 <= record["splits"]["Test"] <= 30
    assert {row["split"] for row in rows(tmp_path / "out")} == {"Training", "Test"}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"weights": "random:1"}, "weights_digest"),
        ({"image_size": 64}, "preprocessing size 32"),
        ({"backend": "torch"}, "backend"),
    ],
)
def test_other_settings_are_refused(extracted: Extracted, change: dict[str, Any], key: str) -> None:
    if "backend" in change:
        pytest.importorskip("torch")
    source, out = extracted
    before = rows(out)
    with pytest.raises(MismatchError, match=rf"{key}.*another --out"):
        extract(source, out, ExtractOptions(**{**QUICK.__dict__, **change}))
    assert rows(out) == before


def test_another_source_is_refused(extracted: Extracted, tmp_path: Path) -> None:
    source, out = extracted
    moved = tmp_path / "elsewhere"
    source.rename(moved)
    with pytest.raises(MismatchError, match="--source-moved"):
        extract(moved, out, QUICK)
    option = ExtractOptions(**{**QUICK.__dict__, "source_moved": True})
    assert extract(moved, out, option)["times"]["computed"] == 0


def test_a_busy_out_is_refused(source: Path, tmp_path: Path) -> None:
    out = layout.open_out(tmp_path / "out")
    with layout.lock(out), pytest.raises(BusyError):
        extract(source, out.root, QUICK)


def test_no_photos_and_an_out_inside(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(SourceError, match=r"holds no photos \(1 other files\)"):
        extract(tmp_path / "empty", tmp_path / "out", QUICK)
    with pytest.raises(SourceError, match="does not exist"):
        extract(tmp_path / "nowhere", tmp_path / "out", QUICK)
    with pytest.raises(RequestError, match="source lies inside"):
        extract(source, source.parent, QUICK)
    spark_reads = ExtractOptions(**{**QUICK.__dict__, "reader": "spark"})
    with pytest.raises(RequestError, match="inside the source"):
        extract(source, source / "out", spark_reads)
    mine = tmp_path / "project" / "projection"
    mine.mkdir(parents=True)
    with pytest.raises(RequestError, match="isn't Pomona's"):
        extract(source, mine.parent, QUICK)
    for inside in (source, source / "out", source / "Training" / ".." / "o"):
        with pytest.raises(RequestError, match="inside the source"):
            extract(source, inside, QUICK)


def test_bad_photos_are_rows_and_are_counted(source: Path, tmp_path: Path) -> None:
    folder = source / "Training" / "Fruit 0"
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    (folder / "cut.jpg").write_bytes(photo(5)[:900])
    (folder / "dangling.jpg").symlink_to(folder / "nowhere")
    (folder / "folder.jpg").mkdir()
    record = extract(source, tmp_path / "out", QUICK)
    wanted = {"empty": 1, "not_an_image": 1, "truncated": 1, "unreadable": 2}
    assert record["rejected"] == wanted
    assert record["photos"] == len(rows(tmp_path / "out")) == 53
    with (tmp_path / "out" / "rejected.csv").open(newline="") as file:
        rejected = list(csv.DictReader(file))
    assert {row["path"].rsplit("/", 1)[1]: row["error"] for row in rejected} == {
        "empty.jpg": "empty",
        "text.jpg": "not_an_image",
        "cut.jpg": "truncated",
        "dangling.jpg": "unreadable",
        "folder.jpg": "unreadable",
    }
    assert rejected[0].keys() == {"path", "split", "label", "error"}
    found = status(tmp_path / "out")
    assert found["rejected"] == wanted
    assert (found["photos"], found["done"], found["todo"]) == (53, 53, 0)
    assert rejected_share(record) == pytest.approx(5 / 53)


def test_what_was_unreadable_is_tried_again(source: Path, tmp_path: Path) -> None:
    link = source / "Training" / "Fruit 0" / "later.jpg"
    link.symlink_to(tmp_path / "later.jpg")
    out = tmp_path / "out"
    assert extract(source, out, QUICK)["rejected"] == {"unreadable": 1}
    digest = outputs(out)["extract"]["digests"]["features"]
    assert extract(source, out, QUICK)["rejected"] == {"unreadable": 1}
    assert outputs(out)["extract"]["digests"]["features"] == digest
    (tmp_path / "later.jpg").write_bytes(photo(3))
    assert extract(source, out, QUICK)["rejected"] == {}


def test_binary_file_gives_the_same_table(spark: Any, tmp_path: Path) -> None:
    """A local folder read as Hadoop's URIs are, and as local folders are."""
    source = fill(tmp_path / "source [1] {x}")
    for name in ("a b.jpg", "été.JPG", "50%20off.jpeg", "k=v.Png", "#1.jpg", "it's.jpg", "🍎.jpg"):
        folder = source / "Training" / f"L {name}"
        folder.mkdir()
        (folder / name).write_bytes(photo(len(name)))
    (source / "Training" / "Fruit 0" / "cut.jpg").write_bytes(photo(1)[:700])
    (source / "Training" / "Fruit 0" / "empty.jpg").write_bytes(b"")
    (source / "Training" / "Fruit 0" / "notes.txt").write_text("x")
    extract(source, tmp_path / "one", QUICK)
    spark_reads = ExtractOptions(**{**QUICK.__dict__, "reader": "spark"})
    record = extract(source, tmp_path / "two", spark_reads)
    assert rows(tmp_path / "one") == rows(tmp_path / "two")
    assert record["photos"] == 48 + 7 + 2
    assert extract(source, tmp_path / "two", spark_reads)["times"]["computed"] == 0
    (source / "Training" / "Fruit 0" / "new.jpg").write_bytes(photo(9))
    assert extract(source, tmp_path / "two", spark_reads)["times"]["computed"] == 1


def test_what_vanishes_from_hadoop_is_unreadable(
    spark: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pomona.spark import binary_files

    listed = binary_files.list_hadoop

    def then_gone(*given: Any) -> Any:
        found = listed(*given)
        (source / "Training/Fruit 0/3_100.jpg").unlink()
        return found

    monkeypatch.setattr("pomona.pipeline.extract.list_hadoop", then_gone)
    options = ExtractOptions(**{**QUICK.__dict__, "reader": "spark"})
    record = extract(source, tmp_path / "out", options)
    assert record["rejected"] == {"unreadable": 1}
    assert record["photos"] == len(rows(tmp_path / "out")) == 48


def test_binary_file_doesnt_make_a_partition_of_each_photo(spark: Any, source: Path) -> None:
    from pomona.pipeline.extract_hadoop import PARTITION_BYTES, _conf
    from pomona.spark import binary_files

    per_task = 16
    settings = {
        "spark.sql.files.openCostInBytes": str(PARTITION_BYTES // per_task),
        "spark.sql.files.maxPartitionBytes": str(PARTITION_BYTES),
        "spark.sql.files.minPartitionNum": "2",
    }
    with _conf(spark, settings):
        frame = binary_files.binary_files(spark, str(source))
        count = len(frame.select("path").mapInArrow(_partition_names, "n int").distinct().collect())
    assert 2 <= count <= 5


def _partition_names(batches: Any) -> Any:
    import pyarrow as pa

    from pomona.spark.tasks import partition

    for _ in batches:
        yield pa.RecordBatch.from_pydict({"n": pa.array([partition()], pa.int32())})
