"""A finished OUT, with photos in it that are to be forgotten."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from PIL import Image

from pomona.pipeline.extract import ExtractOptions
from pomona.pipeline.reduce import ReduceOptions
from pomona.pipeline.run import run
from pomona.pipeline.train import TrainOptions
from pomona.privacy.forget import ForgetOptions
from pomona.privacy.occurrences import DERIVED
from tests.privacy.leftovers import MAGENTA, feature_rows

QUICK = ExtractOptions(weights="fruits", image_size=32, device="cpu", label="top")
QUIET = ForgetOptions(rebuild=False)
SECRET = (
    "Training/Fruit 0/ann & bob/Zoé Quux-7731.jpg",
    "Training/Fruit 1/cat/portrait'kilo 7732.jpg",
    "Test/Fruit 0/dan/whiskey7733.jpg",
    "Training/Fruit 2/eve/truncated7734.jpg",
    "Training/Fruit 2/eve/gone7735.jpg",
)
"""Photos to forget: their colour is nobody else's, and the last two can't be used."""
MAKE = b"EXIFMAKER7736"
"""The camera's maker in each photo's EXIF."""


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


def write_answers(out: Path, paths: list[str]) -> Path:
    """As `predict --out` leaves them."""
    write(out, "answers/_answers.json", b"{}")
    file = out / "answers" / "part-00000.parquet"
    pq.write_table(pa.table({"path": paths, "label": ["a", "b"]}), file)
    return file


def others(out: Path) -> list[dict[str, Any]]:
    return [row for row in feature_rows(out) if row["path"] not in SECRET]


def model_is_gone(out: Path) -> bool:
    return not any((out / name).exists() for name in (*DERIVED, "report/report.html"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``source`` and ``out``, a whole run without MLflow. Not to be changed.

    Made once for all of xdist's workers, by the first that asks.
    """
    pytest.importorskip("sklearn")
    root = tmp_path_factory.getbasetemp()
    base = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "forget"
    with FileLock(base.with_name("forget.lock")):
        if not (base / "finished").exists():
            write_source(base / "source")
            options = TrainOptions(unknown="neighbours")
            run(base / "source", base / "out", QUICK, ReduceOptions(10), train_options=options)
            log = f"a line\nWARNING unreadable: {SECRET[4]}: gone\nanother line\n"
            (base / "out" / "pomona.log").write_text(log, encoding="utf-8")
            (base / "finished").touch()
    return base


def write_source(root: Path) -> None:
    for split in ("Training", "Test"):
        for label in range(3):
            for n in range(8):
                seed = 1000 * label + 10 * n + (split == "Test")
                write(root, f"{split}/Fruit {label}/kind {n % 2}/{n}.jpg", picture(seed))
    for n, path in enumerate(SECRET):
        write(root, path, picture(n, secret=True))
    whole = picture(3, secret=True)
    write(root, SECRET[3], whole[: len(whole) // 2])
    write(root, "Training/Fruit 1/kind 0/broken.jpg", b"no photo")
    (root / SECRET[4]).unlink()
    (root / SECRET[4]).symlink_to(root / "nothing")


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished OUT, to forget in."""
    return Path(shutil.copytree(finished / "out", tmp_path / "out"))
