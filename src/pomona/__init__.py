"""Pomona: folders of fruit photos become features, and features become PCA features, on Spark.

The names that notebook users know are importable from here; each is loaded when it is first used,
so that ``import pomona`` costs nothing on an executor or in the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pomona.backbone import BackboneSpec, extract
    from pomona.columns import predict_images
    from pomona.extractor import MobileNetV2Extractor
    from pomona.frames import load_images
    from pomona.sparkml import MobileNetV2Features

__version__ = "0.1.0"
__all__ = [
    "BackboneSpec",
    "MobileNetV2Extractor",
    "MobileNetV2Features",
    "__version__",
    "extract",
    "load_images",
    "predict_images",
]

_HOME = {
    "BackboneSpec": "pomona.backbone",
    "MobileNetV2Extractor": "pomona.extractor",
    "MobileNetV2Features": "pomona.sparkml",
    "extract": "pomona.backbone",
    "load_images": "pomona.frames",
    "predict_images": "pomona.columns",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pomona' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
