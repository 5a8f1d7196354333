"""Points around a centre for each label."""

from __future__ import annotations

from typing import Any

import numpy as np

from pomona.model.sampling import Codes


def blobs(labels: int = 4, each: int = 40, seed: int = 0) -> tuple[Any, Codes]:
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(labels), each)
    centres = rng.standard_normal((labels, 6)) * 4
    return (centres[y] + rng.standard_normal((len(y), 6))).astype(np.float32), y
