"""Scaler and PCA on Spark: Pomona's moments and one eigh beside Spark ML's StandardScaler and PCA.

Both start from the same Parquet table of features and end with 50 fitted components, on local[2],
each in its own process. Spark's start is not in the seconds; its tasks are.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import common
from pomona.backbone.extract import feature_column
from pomona.core.errors import RequestError
from pomona.core.files import FORMAT, write_json
from pomona.core.parquet import even_bounds, open_parquet
from pomona.core.schema import FEATURES, FEATURES_TABLE, without
from pomona.model import projection
from pomona.pipeline import reduce
from pomona.spark.engine import SparkEngine
from pomona.spark.session import Cluster, session
from pomona.workspace import layout
from pomona.workspace.compaction import ROWS_PER_FILE

COMPONENTS = 50
FACTORS = 200
MASTER = "local[2]"

CONTENDERS = ("Pomona", "Spark ML")


# --- contenders, each in a child ---------------------------------------------------------------


def fit_pomona(root: str) -> dict[str, Any]:
    """Fit as `pomona.pipeline.reduce.reduce` does."""
    out = layout.open_out(root, must_exist=True)
    with session(Cluster(MASTER, log_file=out.log)):
        start = time.perf_counter()
        groups = reduce.row_groups(out)
        moments = reduce.moments(out, groups, 1.0, SparkEngine(Cluster()), lambda done: None)
        merged = time.perf_counter()
        found = projection.fit(moments, COMPONENTS)
        end = time.perf_counter()
    return {
        "seconds": end - start,
        "parts": {"moments": merged - start, "eigh": end - merged},
        "variances": found.explained_variance_ratio[:COMPONENTS].tolist(),
        "rows": found.count,
    }


def fit_spark_ml(root: str) -> dict[str, Any]:
    """Fit as Spark ML's guide does: vectors, StandardScaler, PCA."""
    from pyspark.ml.feature import PCA, StandardScaler
    from pyspark.ml.functions import array_to_vector

    out = layout.open_out(root, must_exist=True)
    with session(Cluster(MASTER, log_file=out.log)) as spark:
        start = time.perf_counter()
        rows = spark.read.parquet(str(out.features)).where(
            "split = 'Training' and features is not null"
        )
        vectors = rows.select(array_to_vector("features").alias("features"))
        scaler = StandardScaler(
            withMean=True, withStd=True, inputCol="features", outputCol="scaled"
        ).fit(vectors)
        scaled = time.perf_counter()
        pca = PCA(k=COMPONENTS, inputCol="scaled", outputCol="pca_features").fit(
            scaler.transform(vectors)
        )
        end = time.perf_counter()
        count = vectors.count()
        variances = pca.explainedVariance.toArray().tolist()
    return {
        "seconds": end - start,
        "parts": {"StandardScaler": scaled - start, "PCA": end - scaled},
        "variances": variances,
        "rows": count,
    }


FITS = dict(zip(CONTENDERS, (fit_pomona, fit_spark_ml), strict=True))


# --- a table -----------------------------------------------------------------------------------


def make_table(root: Path, rows: int) -> None:
    """Write a table of random correlated features: few factors, of falling strength, and noise."""
    rng = np.random.default_rng(0)
    strength = 1.0 / np.sqrt(np.arange(1, FACTORS + 1, dtype=np.float32))
    mixing = (rng.standard_normal((FACTORS, FEATURES)) * strength[:, None]).astype(np.float32)
    bounds = even_bounds(rows, ROWS_PER_FILE)
    files: dict[str, Any] = {}
    for number, (first, last) in enumerate(itertools.pairwise(bounds)):
        name = f"split=Training/part-00000-{number:05d}.parquet"
        write_file(root / "features" / name, first, last, mixing, rng)
        files[name] = {"rows": last - first, "rejected": 0}
    table = {"format": FORMAT, "files": files}
    write_json(layout.open_out(root).table_file, table)


def write_file(
    path: Path, first: int, last: int, mixing: npt.NDArray[np.float32], rng: np.random.Generator
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = without(FEATURES_TABLE, "split")
    with open_parquet(path, schema) as writer:
        for start in range(first, last, 1024):
            count = min(1024, last - start)
            factors = rng.standard_normal((count, FACTORS), np.float32)
            noise = rng.standard_normal((count, FEATURES), np.float32)
            values = (factors @ mixing + 0.5 * noise + 1.0).astype(np.float32)
            writer.write_batch(batch(start, values, schema))


def batch(start: int, values: npt.NDArray[np.float32], schema: pa.Schema) -> pa.RecordBatch:
    count = len(values)
    names = [f"photo{number:08d}.jpg" for number in range(start, start + count)]
    given = {
        "path": pa.array([f"Training/Random/{name}" for name in names]),
        "label": pa.array(["Random"] * count),
        "filename": pa.array(names),
        "features": feature_column(values, np.ones(count, bool)),
    }
    columns = [given.get(field.name, pa.nulls(count, field.type)) for field in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def link_table(root: Path, features: Path) -> None:
    """Let a scratch OUT hold somebody's table, so that nothing is written beside theirs."""
    if not (features / "_table.json").is_file():
        raise RequestError(f"{features} is no table of Pomona's: name OUT/features of an extract")
    (root / "features").symlink_to(features.resolve(), target_is_directory=True)


# --- the benchmark -----------------------------------------------------------------------------


def measure(root: Path, rounds: int) -> dict[str, Any]:
    """Run both contenders in turn and return the figures."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for number in range(rounds):
        for name in CONTENDERS:
            common.say(f"round {number + 1} of {rounds}: {name}")
            answer, peaks = common.run_function(FITS[name], str(root))
            runs[name].append({**answer, "memory": peaks})
    pomona, spark = (runs[name][0] for name in CONTENDERS)
    if pomona["rows"] != spark["rows"]:
        raise RequestError(f"Pomona fitted {pomona['rows']} rows, Spark ML {spark['rows']}")
    ours, theirs = np.array(pomona["variances"]), np.array(spark["variances"])
    seconds = common.medians(
        [{name: runs[name][n]["seconds"] for name in CONTENDERS} for n in range(rounds)]
    )
    return {
        "rows": pomona["rows"],
        "features": FEATURES,
        "components": COMPONENTS,
        "seconds": seconds,
        "ratio": seconds["Spark ML"] / seconds["Pomona"],
        "variances_differ": f"{np.abs(ours / theirs - 1).max():.1e}",
        "variance_kept": float(ours.sum()),
        "runs": {
            name: [{key: run[key] for key in ("seconds", "parts", "memory")} for run in each]
            for name, each in runs.items()
        },
    }


def show(figures: dict[str, Any]) -> None:
    """Print the tables."""
    rows = []
    for name, runs in figures["runs"].items():
        roles = [max(run["memory"].of(role).rss for run in runs) for role in ROLES]
        rows.append((name, figures["seconds"][name], *map(common.megabytes, roles)))
    head = ("contender", "seconds", *(f"{role} MB" for role in ("driver", "JVM", "worker")))
    print(f"{figures['rows']:,} rows of {FEATURES} features to {COMPONENTS} components; peak RSS\n")
    print(common.table(head, rows))
    print()
    for name, runs in figures["runs"].items():
        parts = ", ".join(f"{part} {value:.2f} s" for part, value in runs[0]["parts"].items())
        print(f"{name}: {parts} (first round)")
    print(f"\nSpark ML / Pomona, seconds: {figures['ratio']:.2f}")
    print(
        f"shares of variance, {figures['variance_kept']:.1%} together: "
        f"they differ by {figures['variances_differ']} at most, relatively"
    )


ROLES = ("driver", "jvm", "worker")


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--rows",
        type=common.positive,
        default=35_000,
        metavar="N",
        help="rows of the random table that is made (default: 35000)",
    )
    parser.add_argument(
        "--features", type=Path, metavar="OUT/features", help="take this table's Training rows"
    )
    common.add_rounds(parser, 1)
    options = parser.parse_args()
    with common.scratch() as root:
        prepare(options, root)
        figures = measure(root, options.rounds)
    show(figures)
    common.write_figures(options.json, figures)
    return 0


def prepare(options: argparse.Namespace, root: Path) -> None:
    if options.features:
        link_table(root, options.features)
    else:
        common.say(f"making a table of {options.rows:,} rows")
        make_table(root, options.rows)


if __name__ == "__main__":
    common.start(main)
