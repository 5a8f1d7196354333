"""The files that a run begins with, and the photos among them as a dataset. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.int64]

JOB = "job.json"
PHOTOS, ROWS = "photos.npy", "rows.safetensors"
START, TEACHER = "start.safetensors", "teacher.safetensors"


@dataclass(frozen=True)
class Dataset:
    """Photos in memory (or mapped into it), and what is known about them."""

    photos: npt.NDArray[np.uint8]
    """[n, side, side, 4]: RGB and the mask of `augmentation.foreground_masks`."""
    labels: Codes  # [n], as groups: −1 where training knows no such label or group
    groups: Codes
    train: Codes  # rows, as held_out and test
    held_out: Codes
    test: Codes


def load_dataset(folder: Path) -> Dataset:
    """Return a run's dataset, its photos mapped into memory. Runs on workers, too."""
    from safetensors.numpy import load_file

    return Dataset(np.load(folder / PHOTOS, mmap_mode="r"), **load_file(folder / ROWS))
