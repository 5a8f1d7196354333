"""`MobileNetV2Extractor`, the extractor for notebooks: photos in memory to features."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pomona.backbone import mobilenet
from pomona.backbone.extract import extract_photos, load_network
from pomona.backbone.spec import make_spec
from pomona.backbone.weights import load_weights
from pomona.core.cpus import available_cpus
from pomona.core.errors import RequestError
from pomona.core.schema import FEATURES


class MobileNetV2Extractor:
    """Features of photos in memory, without Spark.

    Parameters
    ----------
    device
        ``auto``, ``cpu`` or ``cuda``.
    batch_size
        Photos per call of the network.
    weights
        As `pomona.backbone.weights.load_weights` takes it.
    backend, image_size
        As `make_spec` takes them.

    Examples
    --------
    >>> import io
    >>> from PIL import Image
    >>> file = io.BytesIO()
    >>> Image.new("RGB", (100, 100), "orange").save(file, "JPEG")
    >>> extractor = MobileNetV2Extractor(device="cpu", weights="random:0")
    >>> extractor.extract(file.getvalue()).shape
    (1280,)
    >>> extractor.extract_batch([file.getvalue()] * 3).shape
    (3, 1280)
    >>> extractor.get_model_info()["weights"]
    'random:0'
    """

    def __init__(
        self,
        device: str = "auto",
        batch_size: int | None = None,
        *,
        weights: str | None = None,
        backend: str = "onnx",
        image_size: int = 224,
    ) -> None:
        loaded = load_weights(weights)
        self._trained = loaded.trained
        spec = make_spec(
            loaded, image_size=image_size, backend=backend, device=device, batch_size=batch_size
        )
        self.spec = replace(spec, threads=available_cpus())

    def extract(self, content: bytes) -> npt.NDArray[np.float32]:
        """Return the features of one photo, float32 [1280].

        Raises
        ------
        RequestError
            If the photo can't be used; the message holds its error code.
        """
        features: npt.NDArray[np.float32] = self.extract_batch([content])[0]
        return features

    def extract_batch(self, contents: list[bytes]) -> npt.NDArray[np.float32]:
        """Return the features of n photos, float32 [n, 1280].

        Raises
        ------
        RequestError
            If a photo can't be used. `pomona.extract` gives it a row with an error code instead.
        """
        photos = extract_photos(contents, self.spec)
        for index, error in enumerate(photos.errors):
            if error is not None:
                raise RequestError(f"photo {index} of {len(contents)} can't be used: {error}")
        return photos.outputs[mobilenet.OUTPUT]

    def get_model_info(self) -> dict[str, Any]:
        """Return the extractor's weights and settings, and one photo's time in milliseconds."""
        blank = np.zeros((1, self.spec.image_size, self.spec.image_size, 3), np.uint8)
        run = load_network(self.spec)
        run(blank)
        start = time.perf_counter()
        run(blank)
        return {
            "name": "MobileNetV2",
            "weights": self.spec.weights,
            "trained": self._trained,
            "device": self.spec.device,
            "batch_size": self.spec.batch_size,
            "features": FEATURES,
            "milliseconds": round(1000 * (time.perf_counter() - start), 2),
            **self.spec.fingerprint(),
        }
