"""The way that users began, as one script: the contender "notebook" of extract.py.

Spark's ``binaryFile``, a pandas UDF that stacks the photos of an Arrow batch (1000 at most) into
one array and calls the model once, Pillow and NumPy, and MobileNetV2 in PyTorch, eager: the recipe
of the featurisation notebooks that data engineers start from. All functions are defined here and
travel to the workers by value, as those of a notebook do.
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

from pomona.backbone.mobilenet_torch import MobileNetV2
from pomona.backbone.weights import load_weights

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
    return pixels.transpose(2, 0, 1)


def featurize(contents: Any, state: Any) -> Any:
    model = build_model(state)
    batch = torch.from_numpy(np.stack(contents.map(preprocess).tolist()))
    with torch.no_grad():
        return pd.Series(list(model(batch).numpy()))


def extract(spark: Any, source: str, out: str, weights: str, partitions: int) -> None:
    found = load_weights(weights).state
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
    if partitions:
        images = images.repartition(partitions)
    features = pandas_udf(lambda contents: featurize(contents, state), "array<float>")
    images.select("path", "label", features("content").alias("features")).write.parquet(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("out", help="a new folder for Parquet")
    parser.add_argument("--weights", default=None, help="default: POMONA_WEIGHTS")
    parser.add_argument(
        "--partitions",
        type=int,
        default=0,
        help="repartition first, so that Arrow batches really hold 1000 photos: a worker then "
        "takes 11 GB (default: as Spark cuts, about 32 photos each)",
    )
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
    extract(spark, options.source, options.out, options.weights, options.partitions)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds}))
    spark.stop()


if __name__ == "__main__":
    main()
