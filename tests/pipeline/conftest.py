"""What the tests of the stages share: an OUT with features, and one with a model, made once."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pomona.core.files import read_json, write_json
from pomona.pipeline.extract import ExtractOptions, extract
from pomona.pipeline.reduce import ReduceOptions
from pomona.pipeline.run import run
from pomona.pipeline.train import TrainOptions
from tests.conftest import fill, photo

QUICK = ExtractOptions(weights="random:0", image_size=32, device="cpu")
FRUITS = ExtractOptions(weights="fruits", image_size=32, device="cpu")
TEN = ReduceOptions(components=10, plots=False)


Extracted = tuple[Path, Path]
"""(source, OUT)."""


def rows(out: Path) -> list[dict[str, Any]]:
    """The table of features, by path."""
    table = [
        {**row, "split": file.parent.name.split("=")[1]}
        for file in sorted((out / "features").glob("split=*/*.parquet"))
        for row in pq.ParquetFile(file).read().to_pylist()
    ]
    return sorted(table, key=lambda row: str(row["path"]))


def outputs(out: Path) -> dict[str, Any]:
    """The manifest's records without times."""
    return {
        name: {k: v for k, v in record.items() if k != "times"}
        for name, record in read_json(out / "manifest.json")["stages"].items()
    }


@pytest.fixture(scope="session")
def extracted_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("extracted")
    extract(fill(base / "source"), base / "out", FRUITS)
    return base


@pytest.fixture
def extracted(extracted_once: Path, tmp_path: Path) -> Extracted:
    """A source and OUT with its features, which a test may change."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(extracted_once / "source", source)
    shutil.copytree(extracted_once / "out", out)
    table = out / "features" / "_table.json"
    write_json(table, {**read_json(table), "source": str(source)})
    return source, out


def varieties(root: Path, each: int = 8) -> Path:
    """Training and Test by label and variety; Test's varieties are its own."""
    for split, kinds in (("Training", range(5)), ("Test", range(5, 7))):
        for label in range(3):
            for kind in kinds:
                folder = root / split / f"Fruit {label}" / f"Kind {label}-{kind}"
                folder.mkdir(parents=True)
                for n in range(each):
                    (folder / f"{n}.jpg").write_bytes(photo(1000 * label + 50 * kind + n))
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT with a model by --label top."""
    base = tmp_path_factory.mktemp("trained")
    source = varieties(base / "source")
    options = replace(QUICK, label="top")
    run(source, base / "out", options, TEN, train_options=TrainOptions())
    return base / "out"
