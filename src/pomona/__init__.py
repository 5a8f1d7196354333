"""Pomona: folders of fruit photos become features, and features become PCA features, on Spark.

The names that notebook users know are importable from here; each is loaded when it is first used,
so that ``import pomona`` costs nothing on an executor or in the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pomona.backbone.extract import extract
    from pomona.backbone.extractor import MobileNetV2Extractor
    from pomona.backbone.spec import BackboneSpec
    from pomona.spark.binary_files import load_images
    from pomona.spark.dataframes import predict_images
    from pomona.spark.ml import MobileNetV2Features

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
    "BackboneSpec": "pomona.backbone.spec",
    "MobileNetV2Extractor": "pomona.backbone.extractor",
    "MobileNetV2Features": "pomona.spark.ml",
    "extract": "pomona.backbone.extract",
    "load_images": "pomona.spark.binary_files",
    "predict_images": "pomona.spark.dataframes",
}


# Saved Spark ML stages and registered models name modules of earlier versions.
__path__.append(f"{__path__[0]}/saved_names")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pomona' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
