"""Pomona: folders of fruit photos become features, features a model, and the model answers.

What a program or a notebook needs is importable from here; each name is loaded when it is first
used, so that ``import pomona`` costs nothing on an executor or in the command line. The stages have
the names of the commands, but for two: `extract_features` is ``pomona extract`` (`extract` is the
function on Arrow batches beneath it), and `export_model` is ``pomona export``.

>>> import pomona
>>> from tempfile import mkdtemp
>>> photos, out = mkdtemp(), mkdtemp()
>>> pomona.synthesize(photos, classes=2, images=16, workers=1)
16
>>> pomona.list_photos(photos).num_rows
16
>>> sorted(set(pomona.list_photos(photos)["label"].to_pylist()))
['Apple Red 1', 'Banana']
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pomona.backbone.extract import extract
    from pomona.backbone.extractor import MobileNetV2Extractor
    from pomona.backbone.spec import BackboneSpec
    from pomona.backbone.weights import default as default_weights
    from pomona.cli.work import progress
    from pomona.core.errors import PomonaError, RequestError
    from pomona.core.provenance import versions
    from pomona.export.export import ExportOptions
    from pomona.export.export import export as export_model
    from pomona.model.artifact import Model, load_model
    from pomona.photos.decoding import decode
    from pomona.photos.synthetic import breakage as add_damaged_photos
    from pomona.photos.synthetic import synthesize
    from pomona.pipeline.extract import ExtractOptions
    from pomona.pipeline.extract import extract as extract_features
    from pomona.pipeline.programs import Results, list_photos, open_out, predict, spark_session
    from pomona.pipeline.reduce import ReduceOptions, reduce
    from pomona.pipeline.report_figures import variance as variance_figure
    from pomona.pipeline.run import report, run, track
    from pomona.pipeline.train import TrainOptions, train
    from pomona.spark.binary_files import load_images
    from pomona.spark.dataframes import predict_images
    from pomona.spark.ml import MobileNetV2Features
    from pomona.spark.resources import slots as task_slots
    from pomona.spark.session import Cluster

__version__ = "0.1.0"
__all__ = [
    "BackboneSpec",
    "Cluster",
    "ExportOptions",
    "ExtractOptions",
    "MobileNetV2Extractor",
    "MobileNetV2Features",
    "Model",
    "PomonaError",
    "ReduceOptions",
    "RequestError",
    "Results",
    "TrainOptions",
    "__version__",
    "add_damaged_photos",
    "decode",
    "default_weights",
    "export_model",
    "extract",
    "extract_features",
    "list_photos",
    "load_images",
    "load_model",
    "open_out",
    "predict",
    "predict_images",
    "progress",
    "reduce",
    "report",
    "run",
    "spark_session",
    "synthesize",
    "task_slots",
    "track",
    "train",
    "variance_figure",
    "versions",
]

_HOME = {
    "BackboneSpec": "pomona.backbone.spec:BackboneSpec",
    "Cluster": "pomona.spark.session:Cluster",
    "ExportOptions": "pomona.export.export:ExportOptions",
    "ExtractOptions": "pomona.pipeline.extract:ExtractOptions",
    "MobileNetV2Extractor": "pomona.backbone.extractor:MobileNetV2Extractor",
    "MobileNetV2Features": "pomona.spark.ml:MobileNetV2Features",
    "Model": "pomona.model.artifact:Model",
    "PomonaError": "pomona.core.errors:PomonaError",
    "ReduceOptions": "pomona.pipeline.reduce:ReduceOptions",
    "RequestError": "pomona.core.errors:RequestError",
    "Results": "pomona.pipeline.programs:Results",
    "TrainOptions": "pomona.pipeline.train:TrainOptions",
    "add_damaged_photos": "pomona.photos.synthetic:breakage",
    "decode": "pomona.photos.decoding:decode",
    "default_weights": "pomona.backbone.weights:default",
    "export_model": "pomona.export.export:export",
    "extract": "pomona.backbone.extract:extract",
    "extract_features": "pomona.pipeline.extract:extract",
    "list_photos": "pomona.pipeline.programs:list_photos",
    "load_images": "pomona.spark.binary_files:load_images",
    "load_model": "pomona.model.artifact:load_model",
    "open_out": "pomona.pipeline.programs:open_out",
    "predict": "pomona.pipeline.programs:predict",
    "predict_images": "pomona.spark.dataframes:predict_images",
    "progress": "pomona.cli.work:progress",
    "reduce": "pomona.pipeline.reduce:reduce",
    "report": "pomona.pipeline.run:report",
    "run": "pomona.pipeline.run:run",
    "spark_session": "pomona.pipeline.programs:spark_session",
    "synthesize": "pomona.photos.synthetic:synthesize",
    "task_slots": "pomona.spark.resources:slots",
    "track": "pomona.pipeline.run:track",
    "train": "pomona.pipeline.train:train",
    "variance_figure": "pomona.pipeline.report_figures:variance",
    "versions": "pomona.core.provenance:versions",
}
"""Each public name's module, and what it is called there."""

# Saved Spark ML stages and registered models name modules of earlier versions.
__path__.append(f"{__path__[0]}/saved_names")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pomona' has no attribute {name!r}")
    from importlib import import_module

    module, _, attribute = _HOME[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
