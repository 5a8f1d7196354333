"""What a peer's worker does with photos: decode and infer, as plainly as one would write it."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnxruntime as ort
from PIL import Image

BATCH = 8


class Network:
    """A session of one thread."""

    def __init__(self, model: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        self.size = int(self.session.get_inputs()[0].shape[1])

    def features(self, contents: list[bytes]) -> list[list[float] | None]:
        """Return 1280 numbers for each photo, None where it can't be decoded."""
        pixels = [self._decode(content) for content in contents]
        good = [n for n, square in enumerate(pixels) if square is not None]
        rows: list[list[float] | None] = [None] * len(contents)
        for start in range(0, len(good), BATCH):
            some = good[start : start + BATCH]
            (values,) = self.session.run(
                ["features"], {self.input: np.stack([pixels[n] for n in some])}
            )
            for n, row in zip(some, values, strict=True):
                rows[n] = row.tolist()
        return rows

    def _decode(self, content: bytes) -> Any:
        try:
            image = Image.open(io.BytesIO(content)).convert("RGB")
        except OSError:
            return None
        square = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return np.asarray(square)
