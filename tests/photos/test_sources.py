from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pomona.core.errors import RequestError, SourceError
from pomona.core.schema import FILES, PHOTOS
from pomona.photos.listing import list_files
from pomona.photos.reading import read, reader
from pomona.photos.source import arrange, layout_hint, open_readable, open_source
from tests.conftest import photo
from tests.object_stores import paths, table, upload

NAMES = ["a b.jpg", "été.JPG", "50%20off.jpeg", "k=v.png", "#1.jpg", 'it\'s "q".jpg', "🍎.webp"]


def test_local_listing_keeps_names_and_passes_over_the_rest(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).write_bytes(b"x")
    for other in ("notes.txt", "README", ".hidden.jpg", "archive.tar.gz"):
        (tmp_path / other).write_bytes(b"x")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "_DSC1.TIFF").write_bytes(b"xy")
    counts: list[int] = []
    found = list_files(open_source(tmp_path), counts.append)
    assert paths(found.files) == sorted([*NAMES, "deep/er/_DSC1.TIFF"])
    assert found.others == {".txt": 1, "": 1, ".gz": 1}
    assert counts[-1] == len(NAMES) + 1
    assert found.files.schema == FILES
    read_one = reader(open_source(f"file://{tmp_path}"))
    assert all(read_one(path) for path in paths(found.files))


def test_what_cannot_be_read_is_listed(tmp_path: Path) -> None:
    """A dangling link, a folder named x.jpg and a name that isn't UTF-8 get a row each."""
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "x.jpg").mkdir()
    (tmp_path / "album.jpg").mkdir()
    (tmp_path / "album.jpg" / "1.jpg").write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.jpg")).write_bytes(b"x")
    source = open_source(tmp_path)
    found = list_files(source).files
    assert paths(found) == ["album.jpg/1.jpg", "bad\\xff.jpg", "gone.jpg", "x.jpg"]
    batches = read(iter(arrange(found).to_batches()), source)
    contents = {r["path"]: r["content"] for b in batches for r in b.to_pylist()}
    assert [path for path, content in contents.items() if content] == ["album.jpg/1.jpg"]


def test_a_link_to_a_folder_above_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"x")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    (elsewhere / "2.jpg").write_bytes(b"x")
    (tmp_path / "b").symlink_to(elsewhere)
    assert paths(list_files(open_source(tmp_path)).files) == ["a/1.jpg", "b/2.jpg"]


def test_links_in_circles(tmp_path: Path) -> None:
    for name in ("a", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.jpg").write_bytes(b"x")
    (tmp_path / "a" / "x").symlink_to(tmp_path / "c")
    (tmp_path / "c" / "y").symlink_to(tmp_path / "a")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    wanted = ["a/a.jpg", "a/x/c.jpg", "c/c.jpg", "c/y/a.jpg", "self.jpg"]
    assert paths(list_files(open_source(tmp_path)).files) == wanted


def test_names_of_sources(tmp_path: Path) -> None:
    for name in ("a#b", "what?", "my:photos", "50%20"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"x")
        assert open_source(tmp_path / name).root == str(tmp_path / name)
    assert open_source(f"file://{tmp_path}/a#b").root == str(tmp_path / "a#b")
    assert open_source(f"file://{tmp_path}/50%2520").root == str(tmp_path / "50%20")
    os.mkdir(os.fsencode(tmp_path) + b"/bad\xff")  # noqa: PTH102
    with pytest.raises(SourceError, match="not UTF-8"):
        open_source(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff"))


def test_a_file_that_vanishes_or_is_far_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        (tmp_path / name).write_bytes(photo(1))
    source = open_source(tmp_path)
    photos = arrange(list_files(source).files)
    (tmp_path / "2.jpg").unlink()
    monkeypatch.setattr("pomona.photos.reading.MAX_BYTES", 100)
    rows = [row for b in read(iter(photos.to_batches()), source) for row in b.to_pylist()]
    assert [row["content"] and len(row["content"]) for row in rows] == [101, None, 101]


def test_a_source_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        open_source(tmp_path / "no")
    (tmp_path / "f").write_text("x")
    with pytest.raises(SourceError, match="is a file"):
        open_source(tmp_path / "f")
    with pytest.raises(SourceError, match="names no bucket"):
        open_source("s3://")


@pytest.mark.parametrize(
    ("uri", "kind", "root", "store"),
    [
        ("s3://b/x y/%20#z", "object", "b/x y/%20#z", "s3://b"),
        ("s3://b/p/?region=eu-west-3&scheme=http", "object", "b/p", "s3://b?region=eu-west-3&scheme=http"),
        ("s3://b?endpoint_override=http://127.0.0.1:1", "object", "b", "s3://b?endpoint_override=http://127.0.0.1:1"),
        ("s3://b/what?.d", "object", "b/what?.d", "s3://b"),
        ("gs://b/p", "object", "b/p", "gs://b"),
        ("hdfs://nn:8020/p/", "hadoop", "hdfs://nn:8020/p", ""),
        ("dbfs:/mnt/p", "hadoop", "dbfs:/mnt/p", ""),
        ("abfss://c@a.dfs.core.windows.net/p", "hadoop", "abfss://c@a.dfs.core.windows.net/p", ""),
    ],
)  # fmt: skip
def test_uris(uri: str, kind: str, root: str, store: str) -> None:
    found = open_source(uri)
    assert (found.kind, found.root, found.store) == (kind, root, store)
    assert "?region" not in found.name


def test_labels_of_a_split_source() -> None:
    files = table("Test/Apple/Apple 1/1.jpg", "Training/x.jpg", "Training/Kiwi/2.jpg", "else/3.jpg")
    by_parent = arrange(files).to_pylist()
    assert [(r["split"], r["label"], r["filename"]) for r in by_parent] == [
        ("Test", "Apple 1", "1.jpg"),
        ("Training", "Kiwi", "2.jpg"),
        ("Training", "Training", "x.jpg"),
    ]
    assert [r["label"] for r in arrange(files, "top").to_pylist()] == ["Apple", "Kiwi", "Training"]
    assert arrange(files).schema == PHOTOS


def test_a_source_without_splits_is_training() -> None:
    rows = arrange(table("Kiwi/1.jpg", "Training.jpg", "Tests/a/2.jpg")).to_pylist()
    assert {r["split"] for r in rows} == {"Training"}
    assert [r["label"] for r in rows] == ["Kiwi", "a", "photos"]


def test_names_with_newlines_and_dots() -> None:
    rows = arrange(table("Training/a\nb/c\nd.jpg", "Training/../e.jpg")).to_pylist()
    assert sorted((r["label"], r["filename"]) for r in rows) == [
        ("..", "e.jpg"),
        ("a\nb", "c\nd.jpg"),
    ]


def test_test_fraction_is_stable_and_keeps_groups_together() -> None:
    names = [f"Kind {k}/group {g}/{n}.jpg" for k in range(4) for g in range(10) for n in range(25)]
    rows = arrange(table(*names), "parent", 0.2)
    share = rows["split"].to_pylist().count("Test") / len(names)
    assert 0.15 < share < 0.25
    fewer = arrange(table(*names[::3]), "parent", 0.2)
    all_rows = {r["path"]: r["split"] for r in rows.to_pylist()}
    assert all(all_rows[r["path"]] == r["split"] for r in fewer.to_pylist())
    groups: dict[str, set[str]] = {}
    for row in arrange(table(*names), "top", 0.2).to_pylist():
        groups.setdefault(row["path"].rsplit("/", 1)[0], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in groups.values())
    assert set.union(*groups.values()) == {"Training", "Test"}


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 2.0])
def test_test_fraction_is_a_share(fraction: float) -> None:
    with pytest.raises(RequestError, match="between 0 and 1"):
        arrange(table("a/1.jpg"), "parent", fraction)


def test_test_fraction_is_refused_where_splits_are() -> None:
    with pytest.raises(RequestError, match="leave the option out"):
        arrange(table("Training/a/1.jpg"), "parent", 0.5)


def test_hint_when_splits_lie_deeper() -> None:
    assert "fruits-360/" in layout_hint(table("fruits-360/Training/a/1.jpg"))
    assert not layout_hint(table("Training/a/b/1.jpg", "x/y.jpg"))


def test_empty_listing(tmp_path: Path) -> None:
    assert arrange(list_files(open_source(tmp_path)).files).num_rows == 0


# --- an object store, for real against moto's server -------------------------------------------


def test_an_object_store(store: str) -> None:
    contents = {f"a b/Training/Fruit {n % 3}/{n}_100.jpg": photo(n) for n in range(40)}
    contents |= {f"a b/Training/50% = ½/{name}": photo(1) for name in ("é.jpg", "%20.jpg", "#.jpg")}
    contents |= {"a b/notes.txt": b"x", "other/1.jpg": b"x"}
    upload(store, "photos", contents)
    source = open_source(f"s3://photos/a b?{store}")
    found = list_files(source)
    wanted = {key.removeprefix("a b/"): c for key, c in contents.items() if key.endswith("g")}
    del wanted["other/1.jpg"]
    assert paths(found.files) == sorted(wanted)
    assert found.others == {".txt": 1}
    photos = arrange(found.files)
    batches = [b.slice(n, 8) for b in photos.to_batches() for n in range(0, b.num_rows, 8)]
    rows = [row for batch in read(iter(batches), source) for row in batch.to_pylist()]
    assert [row["path"] for row in rows] == photos["path"].to_pylist()
    assert all(row["content"] == wanted[row["path"]] for row in rows)


def test_an_object_that_vanishes_is_unreadable(store: str) -> None:
    upload(store, "vanishing", {"1.jpg": b"x", "2.jpg": b"y"})
    source = open_source(f"s3://vanishing?{store}")
    photos = arrange(list_files(source).files)
    gone = arrange(table("1.jpg", "no.jpg", "2.jpg"))
    assert photos.num_rows == 2
    rows = [row for batch in read(iter(gone.to_batches()), source) for row in batch.to_pylist()]
    assert {row["path"]: row["content"] for row in rows} == {
        "1.jpg": b"x",
        "2.jpg": b"y",
        "no.jpg": None,
    }


def test_a_bucket_that_is_not_there(store: str) -> None:
    with pytest.raises(SourceError, match="can't be listed"):
        list_files(open_source(f"s3://nobody/p?{store}"))


def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    source = open_source(tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(SourceError, match="can't be listed"):
        list_files(source)


def test_photos_that_this_process_cannot_read(tmp_path: Path) -> None:
    assert open_readable(tmp_path) == open_source(tmp_path)
    assert open_readable("s3://bucket/photos").kind == "object"
    with pytest.raises(SourceError, match="does not exist"):
        open_readable(tmp_path / "gone")
    with pytest.raises(SourceError, match="hdfs://nn/p can be read by Spark alone"):
        open_readable("hdfs://nn/p")
