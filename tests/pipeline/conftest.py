"""Photos by label and variety, and a model of them, made once for all tests of the stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pomona.pipeline.extract import ExtractOptions
from pomona.pipeline.reduce import ReduceOptions
from pomona.pipeline.run import run
from pomona.pipeline.train import TrainOptions
from tests.conftest import photo

QUICK = ExtractOptions(weights="random:0", image_size=32, device="cpu")
TEN = ReduceOptions(components=10, plots=False)


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
def trained(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT with a model by --label top."""
    base = tmp_path_factory.mktemp("trained")
    source = varieties(base / "source")
    options = replace(QUICK, label="top")
    run(source, base / "out", options, TEN, train_options=TrainOptions())
    return base / "out"
