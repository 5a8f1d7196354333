"""A model trained on a few photos in a second, for tests that need any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pomona.backbone import mobilenet
from pomona.backbone.extract import extract_photos
from pomona.backbone.spec import make_spec
from pomona.backbone.weights import load_weights
from pomona.model import classifier, projection, unknown
from pomona.model.artifact import Model, load_model, save_model
from pomona.model.head import make_head


def make_model(
    folder: Path, weights_name: str, contents: list[bytes], labels: Sequence[str], size: int
) -> Model:
    """Train on a few photos, without a table."""
    spec = make_spec(load_weights(weights_name), image_size=size, device="cpu")
    features = extract_photos(contents, spec).outputs["features"]
    moments = projection.Moments.of(projection.raised(features, 0.5))
    fitted = projection.fit(moments, 10, power=0.5)
    z = fitted.transform(features)
    names, y = np.unique(labels, return_inverse=True)
    trained = classifier.fit(z, y, tuple(str(name) for name in names), 1.0)
    detector = unknown.make("distance", z, y)
    scores = detector.score(z, trained.logits(z))
    detector = replace(detector, threshold=float(np.quantile(scores, 0.05)))
    about = {
        "weights": {
            "name": weights_name,
            "digest": "-",
            "trained": not weights_name.startswith("random:"),
        },
        "preprocessing": mobilenet.preprocessing(size),
    }
    save_model(folder, spec.payload, make_head(fitted, trained, detector), about)
    return load_model(folder)
