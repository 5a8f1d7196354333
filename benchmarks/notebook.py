"""The way that users began, as one script: the contender "notebook" of extract.py.

Spark's ``binaryFile``, a pandas UDF, Pillow and NumPy, and MobileNetV2 in PyTorch, eager, photo by
photo. All functions are defined here and travel to the workers by value, as those of a notebook do.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from pyspark.sql import SparkSession
from pyspark.sql.functions import col, element_at, pandas_udf, split

from pomona.mobilenet_torch import MobileNetV2
from pomona.weights import load

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
MODEL: list[Any] = []
"""Filled by the first call in a task: Spark unpickles this, empty, for each task."""


def build_model(state: Any) -> Any:
    if not MODEL:
        model = MobileNetV2()
        model.load_state_dict(state.value, strict=False)
        MODEL.append(model.eval())
    return MODEL[0]


def preprocess(content: bytes) -> Any:
    image = (
        Image.open(io.BytesIO(content)).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
    )
    pixels = (np.asarray(image, np.float32) / 255.0 - MEAN) / STD
    return torch.from_numpy(pixels.transpose(2, 0, 1)).unsqueeze(0)


def featurize(contents: Any, state: Any) -> Any:
    model = build_model(state)
    with torch.no_grad():
        return pd.Series([model(preprocess(c)).squeeze(0).numpy() for c in contents])


def extract(spark: Any, source: str, out: str, weights: str) -> None:
    found = load(weights).state
    if found is None:
        sys.exit("the notebook's way needs weights that are not ONNX")
    state = spark.sparkContext.broadcast({k: torch.from_numpy(v) for k, v in found.items()})
    images = (
        spark.read.format("binaryFile")
        .option("pathGlobFilter", "*.jpg")
        .option("recursiveFileLookup", "true")
        .load(source)
        .withColumn("label", element_at(split(col("path"), "/"), -2))
    )
    features = pandas_udf(lambda contents: featurize(contents, state), "array<float>")
    images.select("path", "label", features("content").alias("features")).write.parquet(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("out", help="a new folder for Parquet")
    parser.add_argument("--weights", default=None, help="default: POMONA_WEIGHTS")
    options = parser.parse_args()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    spark = (
        SparkSession.builder.master("local[2]")
        .config("spark.sql.execution.arrow.pyspark.enabled", "true")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", "1000")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.ui.enabled", "false")
        .getOrCreate()
    )
    start = time.perf_counter()
    extract(spark, options.source, options.out, options.weights)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds}))
    spark.stop()


if __name__ == "__main__":
    main()
