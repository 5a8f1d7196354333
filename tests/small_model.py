"""A small model: three labels, images of 32 pixels, a head fitted on photos of noise."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pomona.backbone import mobilenet, weights
from pomona.backbone.spec import BackboneSpec, make_spec
from pomona.model import artifact, classifier, projection, unknown
from pomona.model.head import Head, make_head

SIZE = 32
ABOUT = {
    "weights": {"name": "random:0", "digest": "-", "trained": False},
    "preprocessing": mobilenet.preprocessing(SIZE),
    "unknown": {"keep": 0.95},
}


@functools.cache
def small_spec(name: str = "random:0") -> BackboneSpec:
    """The backbone, from the weights of that name."""
    return make_spec(weights.load_weights(name), image_size=SIZE, device="cpu")


def small_head(features: Any, method: str = "distance", power: float = 0.5) -> Head:
    moments = projection.Moments.of(projection.raised(features, power))
    fitted = projection.fit(moments, 6, power=power)
    z, y = fitted.transform(features), np.arange(len(features)) % 3
    known = classifier.fit(z, y, ("a", "b", "ünknown"), 0.1)
    detector = replace(unknown.make(method, z, y), threshold=-50.0)
    return make_head(fitted, replace(known, temperature=1.7), detector)


def save_small_model(folder: Path, features: Any, name: str = "fruits") -> Path:
    """Save a model on the weights of that name, and return its folder."""
    artifact.save_model(folder, small_spec(name).payload, small_head(features), ABOUT)
    return folder
