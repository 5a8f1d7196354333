"""The rendered fruit: names, counts, reproducible bytes, and that the photos look like photos."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pomona.core.errors import RequestError
from pomona.photos import synthetic
from pomona.photos.decoding import decode
from pomona.photos.synthetic_catalogue import LABELS


def pixels(label: str, frame: int, axis: str = "", size: int = 100) -> npt.NDArray[np.int16]:
    return np.asarray(synthetic.render(label, frame, axis, size=size)).astype(np.int16)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.jpg")}


def test_labels() -> None:
    assert len(LABELS) == len(set(LABELS)) == 131
    assert len({label.split()[0] for label in LABELS[:12]}) == 12


@pytest.mark.parametrize(
    ("classes", "images"),
    [(1, 1), (1, 2), (1, 5_000), (3, 7), (12, 24), (12, 600), (131, 131), (131, 90_483)],
)
def test_plan_counts(classes: int, images: int) -> None:
    photos = synthetic.plan(classes, images)
    assert len(photos) == len({photo.path for photo in photos}) == images
    assert len({(p.label, p.axis, p.frame) for p in photos}) == images  # in one split only
    per_label = Counter(p.label for p in photos)
    assert list(per_label) == list(LABELS[:classes])
    assert max(per_label.values()) - min(per_label.values()) <= 1
    assert all(0 <= p.frame < 360 for p in photos)
    if images >= 2 * classes:
        assert len({(p.split, p.label) for p in photos}) == 2 * classes
    if images >= 40 * classes:
        assert Counter(p.split for p in photos)["Test"] / images == pytest.approx(0.25, abs=0.02)


def test_plan_names() -> None:
    photo = synthetic.Photo("Training", "Apple Red 1", 33, "")
    assert photo.path == "Training/Apple Red 1/33_100.jpg"
    axes = {p.axis for p in synthetic.plan(1, 1_200)}
    assert axes == {"", "r", "r2", "r3"}
    assert "Test/Apple Red 1/r2_" in " ".join(p.path for p in synthetic.plan(131, 90_483))


@pytest.mark.parametrize(("classes", "images"), [(0, 10), (132, 1_000), (12, 11)])
def test_plan_out_of_range(classes: int, images: int) -> None:
    with pytest.raises(RequestError, match="must be"):
        synthetic.plan(classes, images)


def test_bytes_do_not_depend_on_workers(tmp_path: Path) -> None:
    ticks: list[tuple[int, int]] = []
    for workers in (1, 2):
        count = synthetic.synthesize(
            tmp_path / str(workers),
            classes=4,
            images=50,
            workers=workers,
            progress=lambda done, total: ticks.append((done, total)),
        )
        assert count == 50
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert set(contents(tmp_path / "1")) == {p.path for p in synthetic.plan(4, 50)}
    assert ticks[3] == ticks[7] == (50, 50)


def test_seed_changes_the_photos_a_little() -> None:
    first, again, other = (synthetic.render("Pear", 10, seed=seed) for seed in (0, 0, 1))
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert np.abs(np.asarray(first).astype(int) - np.asarray(other)).mean() < 12


@pytest.mark.parametrize("label", ["Apple Red 1", "Banana", "Watermelon", "Cherry Red", "Mango"])
def test_frames_turn(label: str) -> None:
    start, next_one, quarter = (pixels(label, frame) for frame in (0, 1, 90))
    near, far = np.abs(next_one - start).mean(), np.abs(quarter - start).mean()
    assert 0 < near < 0.7 * far


def test_axes_show_other_sides() -> None:
    views = [pixels("Pineapple", 60, axis) for axis in ("", "r", "r2", "r3", "r4")]
    for k, view in enumerate(views):
        assert all(np.abs(view - other).mean() > 5 for other in views[:k])


def test_every_label_is_a_fruit_on_white() -> None:
    thumbnails = []
    for label in LABELS:
        photo = pixels(label, 20)
        assert photo.shape == (100, 100, 3)
        assert (photo[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all(), label
        drawn = (photo < 245).any(axis=2)
        assert 0.08 < drawn.mean() < 0.85, label
        assert photo[drawn].std() > 10, label  # shaded and coloured, not one flat patch
        thumbnails.append(photo.ravel())
    stack = np.stack(thumbnails).astype(np.float32)
    for k in range(1, len(stack)):
        assert np.abs(stack[:k] - stack[k]).mean(axis=1).min() > 1, LABELS[k]


def test_surface_has_no_holes() -> None:
    middle = pixels("Orange", 0)[25:75, 25:75]
    assert (middle[..., 2] < 200).all()  # white would show through as a high blue


@pytest.mark.parametrize("size", [64, 100, 224])
def test_size(size: int) -> None:
    photo = synthetic.render("Lemon", 0, size=size)
    assert (photo.mode, photo.size) == ("RGB", (size, size))


def test_breakage(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="synthesize first"):
        synthetic.breakage(tmp_path)
    synthetic.synthesize(tmp_path, classes=1, images=2, workers=1)
    expected = synthetic.breakage(tmp_path)
    assert set(expected.values()) == {"empty", "not_an_image", "truncated", "too_large"}
    for path, code in expected.items():
        content = (tmp_path / path).read_bytes()
        assert len(content) < 4_000
        assert decode(content, 224).error == code
        if code == "too_large":
            assert Image.open(io.BytesIO(content)).size == (60_000, 60_000)
