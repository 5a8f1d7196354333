"""What power cuts, disks and other programs leave in OUT: it is found, and made again."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pomona.core.errors import DamagedError, RequestError
from pomona.core.files import read_json
from pomona.pipeline.extract import ExtractOptions, extract
from pomona.pipeline.reduce import ReduceOptions, reduce
from pomona.privacy import forget
from pomona.privacy.forget import ForgetOptions
from pomona.workspace import tombstones
from tests.conftest import photo
from tests.pipeline.conftest import FRUITS, QUICK, Extracted, outputs, rows
from tests.power_cut import Here

VERIFY = ExtractOptions(**{**FRUITS.__dict__, "verify": True})
FEW = ReduceOptions(components=5, plots=False)
ALIKE = ("Apple", "apple", "APPLE", "P\u00eache", "Pe\u0302che")
"""Labels whose folders would be fewer where case and composition don't count."""
FORGOTTEN = "Training/Fruit 0/1_100.jpg"


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("extract", "reduce"):
        monkeypatch.setattr(f"pomona.pipeline.{module}.open_engine", lambda *_, **__: Here())


def spoil_pages(path: Path) -> None:
    """Damage the features, and leave footer and key columns as they are."""
    metadata = pq.read_metadata(path)
    names = [metadata.schema.column(n).path for n in range(metadata.num_columns)]
    column = metadata.row_group(0).column(names.index("features.list.element"))
    with path.open("r+b") as file:
        file.seek(column.data_page_offset + column.total_compressed_size // 2)
        content = file.read(8)
        file.seek(-8, os.SEEK_CUR)
        file.write(bytes(byte ^ 0xFF for byte in content))


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def interrupted(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Extract, and be killed before the table is written. Returns the parts."""
    with monkeypatch.context() as patch:
        patch.setattr("pomona.pipeline.extract._compact", stopped)
        with pytest.raises(KeyboardInterrupt):
            extract(source, out, QUICK)
    return sorted(out.glob("_work/parts-*/*.parquet"))


def stopped(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("damage", [spoil_pages, zeros, empty, half])
def test_a_part(
    damage: Callable[[Path], None], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = extract(source, tmp_path / "whole", QUICK)
    out = tmp_path / "out"
    parts = interrupted(source, out, monkeypatch)
    damage(parts[1])
    record = extract(source, out, QUICK)
    assert record["digests"] == whole["digests"]
    assert record["times"]["computed"] == Here.most_photos, "those of one part"


@pytest.mark.parametrize("damage", [zeros, empty, half, Path.unlink])
def test_a_file_of_the_table(damage: Callable[[Path], None], extracted: Extracted) -> None:
    source, out = extracted
    before = read_json(out / "manifest.json")["stages"]["extract"]
    good = rows(out)
    damage(next((out / "features").glob("split=Test/*.parquet")))
    with pytest.raises(DamagedError, match=r"the same pomona extract again makes its rows anew"):
        reduce(out, FEW)
    record = extract(source, out, FRUITS)
    assert record["times"]["computed"] == before["splits"]["Test"]
    assert rows(out) == good
    assert extract(source, out, FRUITS)["times"]["computed"] == 0
    reduce(out, FEW)


def test_pages_of_the_table(extracted: Extracted) -> None:
    """Nothing looks at them until they are read: then the remedy is named, and it helps."""
    source, out = extracted
    good = rows(out)
    spoil_pages(next((out / "features").glob("split=Training/*.parquet")))
    assert extract(source, out, FRUITS)["times"]["computed"] == 0
    with pytest.raises(DamagedError, match="pomona extract --verify makes its rows again"):
        reduce(out, FEW)
    assert extract(source, out, VERIFY)["times"]["computed"] == 24
    assert rows(out) == good
    reduce(out, FEW)


def test_other_bytes_of_the_same_size_and_time(extracted: Extracted) -> None:
    """As `rsync -t` leaves them. Only digests tell."""
    source, out = extracted
    path = source / FORGOTTEN
    old, status = path.read_bytes(), path.stat()
    new = photo(12345)[: len(old)].ljust(len(old), b"\0")
    path.write_bytes(new)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    before = {row["path"]: row for row in rows(out)}
    assert extract(source, out, FRUITS)["times"]["computed"] == 0
    assert extract(source, out, VERIFY)["times"]["computed"] == 1
    after = {row["path"]: row for row in rows(out)}
    assert {p for p, row in after.items() if row != before[p]} == {FORGOTTEN}
    assert extract(source, out, VERIFY)["times"]["computed"] == 0


def test_verify_without_digests(extracted: Extracted) -> None:
    """A table of an older Pomona has none: all its photos are extracted again, once."""
    source, out = extracted
    table = read_json(out / "features" / "_table.json")
    for file in (out / "features").glob("split=*/*.parquet"):
        pq.write_table(pq.ParquetFile(file).read().drop_columns(["sha256"]), file)
        del table["files"][file.relative_to(out / "features").as_posix()]["sha256"]
    for name in table["files"]:
        from pomona.core.files import sha256

        table["files"][name]["sha256"] = sha256(out / "features" / name)
    (out / "features" / "_table.json").write_text(json.dumps(table))
    assert extract(source, out, FRUITS)["times"]["computed"] == 0
    assert extract(source, out, VERIFY)["times"]["computed"] == 48
    assert extract(source, out, VERIFY)["times"]["computed"] == 0


@pytest.mark.parametrize("damage", [empty, half])
def test_the_journal(damage: Callable[[Path], None], extracted: Extracted) -> None:
    source, out = extracted
    extract(source, out, FRUITS)
    reduce(out, FEW)
    good = outputs(out)
    journal = out / "_work" / "journal.json"
    journal.parent.mkdir()
    journal.write_text('[[null, "features/_table.json"]]')
    damage(journal)
    extract(source, out, FRUITS)
    reduce(out, FEW)
    assert outputs(out) == good
    assert not journal.exists()


@pytest.mark.parametrize("damage", [empty, half, Path.unlink, lambda path: path.write_text("{}")])
def test_tombstones(damage: Callable[[Path], Any], extracted: Extracted) -> None:
    """No damage and no remedy lets a forgotten photo come back."""
    source, out = extracted
    forget.forget(out, [FORGOTTEN], ForgetOptions(rebuild=False))
    first, second = (out / name for name in tombstones.FILES)
    backup = first.read_bytes()
    damage(first)
    assert extract(source, out, FRUITS)["forgotten"] == 1, "the copy counts"
    damage(second)
    with pytest.raises(DamagedError, match="put it back from a backup") as told:
        extract(source, out, FRUITS)
    assert "remove" not in str(told.value)
    second.write_bytes(backup)
    assert extract(source, out, FRUITS)["forgotten"] == 1
    assert FORGOTTEN not in {row["path"] for row in rows(out)}


@pytest.mark.parametrize("name", ["features", "projection", "report", "forgotten", "_work"])
def test_a_folder_that_is_a_link(name: str, extracted: Extracted, tmp_path: Path) -> None:
    source, out = extracted
    reduce(out, FEW)
    (out / name).mkdir(exist_ok=True)
    elsewhere = tmp_path / "elsewhere"
    shutil.move(out / name, elsewhere)
    (out / name).symlink_to(elsewhere)
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(RequestError, match=rf"{name} is a link, and .* move the folder into"):
        reduce(out, ReduceOptions(components=3, plots=False))
    with pytest.raises(RequestError, match="is a link"):
        extract(source, out, FRUITS)
    assert sorted(path.name for path in out.iterdir()) == before
    (out / name).unlink()
    shutil.move(elsewhere, out / name)
    assert extract(source, out, FRUITS)["times"]["computed"] == 0


def test_out_may_be_a_link(extracted: Extracted, tmp_path: Path) -> None:
    _, out = extracted
    (tmp_path / "link").symlink_to(out)
    assert reduce(tmp_path / "link", FEW)["components"] == 5


def test_a_folder_on_another_disk(extracted: Extracted, monkeypatch: pytest.MonkeyPatch) -> None:
    _, out = extracted
    true_stat = Path.stat

    def stat(path: Path, **options: Any) -> Any:
        found = true_stat(path, **options)
        if path.name == "features":
            return os.stat_result((*found[:2], found.st_dev + 1, *found[3:]))
        return found

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(RequestError, match="features lies on another disk"):
        reduce(out, FEW)


def test_labels_that_differ_in_case_alone(tmp_path: Path) -> None:
    """Each has a folder of its own, also on a disk where case doesn't count."""
    source, out = tmp_path / "source", tmp_path / "out"
    for n, label in enumerate(ALIKE):
        for split in ("Training", "Test"):
            folder = source / split / label
            folder.mkdir(parents=True)
            for number in range(4):
                (folder / f"{number}.jpg").write_bytes(photo(10 * n + number))
    extract(source, out, QUICK)
    reduce(out, FEW)
    for name in ("training_pca", "test_pca"):
        folders = [path.name for path in (out / name).iterdir()]
        assert len({folder.casefold() for folder in folders}) == 5
        table = pq.read_table(out / name)
        assert Counter(table["label"].to_pylist()) == dict.fromkeys(ALIKE, 4)
