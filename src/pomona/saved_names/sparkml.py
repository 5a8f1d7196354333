"""The name that Spark ML stages saved by version 0.1 hold: `pomona.spark.ml`."""

from pomona.spark.ml import MobileNetV2Features

__all__ = ["MobileNetV2Features"]
