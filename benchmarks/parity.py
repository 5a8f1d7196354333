"""The same photo, the same answer: four ways over all photos of a finished OUT.

    python benchmarks/parity.py --out OUT

Stage by stage in NumPy (the table of features, then projection and classifier in float64), the
tables that Spark wrote (``training_pca``, ``test_pca``), ``pomona predict`` on Spark, and
``model.onnx`` alone in ONNX Runtime, fed by Pillow and NumPy without Pomona.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pyarrow.parquet as pq
from PIL import Image

from pomona.backbone.extract import features_of
from pomona.core.files import read_json
from pomona.model import artifact, pca_table
from pomona.pipeline.predict import PredictOptions, predict
from pomona.spark.session import Cluster
from pomona.workspace import layout


def alone(folder: Path, root: Path, paths: list[str]) -> dict[str, Any]:
    """Nothing of Pomona's but the file."""
    options = ort.SessionOptions()
    session = ort.InferenceSession(
        (folder / "model.onnx").read_bytes(), options, providers=["CPUExecutionProvider"]
    )
    about = json.loads((folder / "model.json").read_text())
    size = about["preprocessing"]["image_size"]
    found = []
    for start in range(0, len(paths), 8):
        pixels = [
            np.asarray(
                Image.open(io.BytesIO((root / path).read_bytes()))
                .convert("RGB")
                .resize((size, size), Image.Resampling.BILINEAR)
            )
            for path in paths[start : start + 8]
        ]
        found.append(session.run(["probabilities", "score"], {"image": np.stack(pixels)}))
    return {
        "probabilities": np.concatenate([p for p, _ in found]),
        "score": np.concatenate([s for _, s in found]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    out = layout.open_out(options.out, must_exist=True)
    root = Path(read_json(out.table_file)["source"])
    found = artifact.load_model(out.model)
    table = pq.read_table(out.features, columns=["path", "features"])
    table = table.filter(table["features"].is_valid()).sort_by("path")
    paths = table["path"].to_pylist()
    numpy = found.head().apply(features_of(table["features"]))
    ways = {"NumPy, stage by stage": numpy["probabilities"]}

    z: dict[str, Any] = {}
    for name in ("training_pca", "test_pca"):
        rows = pca_table.read_photos(out, name, 10**9)
        z |= dict(zip(rows.paths, rows.z, strict=True))
    ways["Spark's PCA tables"] = found.head().classifier.probabilities(
        np.stack([z[path] for path in paths])
    )
    one = alone(out.model, root, paths)
    ways["model.onnx alone"] = one["probabilities"]
    ways["predict on Spark"] = by_predict(found, root, paths)

    first = numpy["probabilities"]
    labels = first.argmax(axis=1)
    print(f"{len(paths):,} photos, {len(found.labels)} labels; against NumPy in float64:")
    for name, values in list(ways.items())[1:]:
        same = (values.argmax(axis=1) == labels).sum()
        print(
            f"  {name:22} {same:,} of {len(paths):,} labels the same, "
            f"largest difference of a probability {np.abs(values - first).max():.1e}"
        )
    limit = found.about["unknown"]["threshold"]
    differ = ((one["score"] < limit) != (numpy["score"] < limit)).sum()
    print(f"  unknown or not differs on {differ} photos between model.onnx and NumPy")


def by_predict(found: artifact.Model, root: Path, paths: list[str]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        wanted = PredictOptions(
            top=len(found.labels), out=f"{folder}/answers", cluster=Cluster("local[*]")
        )
        record = predict([str(root)], found, wanted)
        print(f"predict on Spark: {record['photos']:,} photos in {record['seconds']:.0f} s")
        rows = pq.read_table(f"{folder}/answers").to_pylist()
    place = {label: n for n, label in enumerate(found.labels)}
    values = np.zeros((len(paths), len(place)))
    where = {f"{root}/{path}": n for n, path in enumerate(paths)}
    for row in rows:
        if row["error"] is None:
            for label, p in zip(row["nearest"], row["probabilities"], strict=True):
                values[where[row["path"]], place[label]] = p
    return values


if __name__ == "__main__":
    main()
