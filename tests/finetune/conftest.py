"""Tiny datasets and weights: what a test of training needs."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pomona.backbone import mobilenet
from pomona.finetune.dataset import JOB, PHOTOS, ROWS, START, Dataset
from pomona.finetune.recipe import Recipe

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several threads are slower on photos of 32 pixels, and much slower on a busy machine."""
    import torch

    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def statistics() -> dict[str, Any]:
    """Weights as training leaves them: every batch norm has statistics of its own."""
    rng = np.random.default_rng(5)
    state = mobilenet.random_state(3)
    for conv in mobilenet.convs():
        n = conv.outputs
        state[f"{conv.norm}.weight"] = rng.uniform(0.5, 1.5, n).astype(np.float32)
        state[f"{conv.norm}.bias"] = rng.normal(0, 0.2, n).astype(np.float32)
        state[f"{conv.norm}.running_mean"] = rng.normal(0, 0.2, n).astype(np.float32)
        state[f"{conv.norm}.running_var"] = rng.uniform(0.5, 2, n).astype(np.float32)
    return state


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    """Noise of two labels and four groups: 16 photos to train on, four held out, four of Test."""
    rng = np.random.default_rng(0)
    photos = rng.integers(0, 256, (24, 32, 32, 4), dtype=np.uint8)
    rows = np.arange(24)
    return Dataset(photos, rows % 2, rows % 4, rows[:16], rows[16:20], rows[20:])


@pytest.fixture
def folder(tmp_path: Path, dataset: Dataset) -> Path:
    """A run's folder, as the stage prepares it: ten steps on the dataset from a random start."""
    from safetensors.numpy import save_file

    arrays: dict[str, Any] = dict(vars(dataset))
    np.save(tmp_path / PHOTOS, arrays.pop("photos"))
    save_file(arrays, tmp_path / ROWS)
    save_file(mobilenet.random_state(4), tmp_path / START)
    recipe = asdict(Recipe(image_size=32, batch_size=8, norm=True))
    job = {"recipe": recipe, "steps": 10, "seconds": None, "trained": False, "device": "cpu"}
    (tmp_path / JOB).write_text(json.dumps(job))
    return tmp_path
