"""Options that several commands share, as dataclasses (see `pomona.cli.app.with_options`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from pomona.core.errors import RequestError

if TYPE_CHECKING:
    from pomona.pipeline.extract import ExtractOptions
    from pomona.pipeline.reduce import ReduceOptions
    from pomona.pipeline.train import TrainOptions
    from pomona.spark.session import Cluster

TOO_MANY_REJECTED = 3
"""The exit code above ``--max-error-rate``."""

SourceName = Annotated[
    str, typer.Argument(help="A folder of photos, or a URI (s3://, gs://, hdfs://).")
]
OutDir = Annotated[
    str, Option("--out", help="Where the results go: a folder, or a URI (s3://, gs://).")
]
LocalOut = Annotated[str, Option("--out", help="The folder for the results.")]
Device = Annotated[str, Option(help="auto, cpu or cuda.")]
ImageSize = Annotated[int, Option(help="Side that photos are stretched to, in pixels.")]
Label = Annotated[
    str, Option(help="parent: the photo's folder; top: the first folder under the split.")
]
TestFraction = Annotated[
    float | None,
    Option(help="Share that goes to Test, in a source without Training and Test folders."),
]
Master = Annotated[
    str, Option(help="Spark's master, or sc://HOST:PORT, unless a session is active.")
]
SparkConf = Annotated[list[str] | None, Option(help="A setting of Spark, KEY=VALUE; repeatable.")]
NoPlots = Annotated[bool, Option("--no-plots", help="Draw nothing, and write no report.")]
NoMlflow = Annotated[bool, Option("--no-mlflow", help="Record nothing in MLflow.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON for machines.")]


@dataclass(frozen=True)
class ExtractArguments:
    """How photos become features."""

    weights: Annotated[
        str | None,
        Option(
            help="imagenet, fruits (in the package), random:SEED (untrained), or a .safetensors, "
            ".pth or .onnx file. [default: POMONA_WEIGHTS, or imagenet]",
            show_default=False,
        ),
    ] = None
    backend: Annotated[str, Option(help="onnx or torch.")] = "onnx"
    device: Device = "auto"
    image_size: ImageSize = 224
    batch_size: Annotated[
        int | None, Option(help="Photos per call of the network. [default: 8, on a GPU 128]")
    ] = None
    label: Label = "parent"
    test_fraction: TestFraction = None
    keep_deleted: Annotated[
        bool, Option("--keep-deleted", help="Keep the rows of photos that left the source.")
    ] = False
    source_moved: Annotated[
        bool, Option("--source-moved", help="The source of OUT's photos has a new address.")
    ] = False
    reader: Annotated[
        str, Option(help="auto, or spark: read through Spark's binaryFile, whatever the source.")
    ] = "auto"

    def options(self) -> ExtractOptions:
        """Return the stage's options."""
        from pomona.pipeline.extract import ExtractOptions

        if self.reader not in ("auto", "spark"):
            raise RequestError(f"--reader is auto or spark, not {self.reader}")
        return ExtractOptions(**vars(self))


@dataclass(frozen=True)
class ReduceArguments:
    """How features become PCA features."""

    components: Annotated[
        str, Option(help="How many (50), or the share of the variance to keep (0.95).")
    ] = "50"
    power: Annotated[
        float, Option(help="Raise features to this power first: 0.5, or 1 to leave them.")
    ] = 0.5
    no_scale: Annotated[
        bool, Option("--no-scale", help="Don't bring features to standard deviation 1 first.")
    ] = False
    whiten: Annotated[
        bool, Option("--whiten", help="Bring pca_features to standard deviation 1.")
    ] = False

    def options(self, *, plots: bool) -> ReduceOptions:
        """Return the stage's options."""
        from pomona.model.projection import parse_components
        from pomona.pipeline.reduce import ReduceOptions

        components = parse_components(self.components)
        return ReduceOptions(components, not self.no_scale, self.whiten, self.power, plots)


@dataclass(frozen=True)
class TrainArguments:
    """How PCA features become a model."""

    class_weight: Annotated[
        str, Option(help="none, or balanced: each label counts the same in training.")
    ] = "none"
    max_rows: Annotated[
        int, Option(help="Photos to train on at most: above, a sample stratified by label.")
    ] = 1_000_000
    unknown: Annotated[
        str,
        Option(
            help="How photos of none of the labels are recognised: auto (the best on labels left "
            "out), max_probability, energy, distance or neighbours."
        ),
    ] = "auto"
    keep: Annotated[
        float, Option(help="Share of photos of known labels that must not be called unknown.")
    ] = 0.95

    def options(self) -> TrainOptions:
        """Return the stage's options."""
        from pomona.pipeline.train import TrainOptions

        return TrainOptions(**vars(self))


@dataclass(frozen=True)
class SparkArguments:
    """Where Spark runs, and how it is set."""

    master: Master = "local[*]"
    spark_conf: SparkConf = None

    def cluster(self) -> Cluster:
        """Return the cluster that is asked for."""
        from pomona.spark.session import Cluster

        return Cluster(self.master, spark_pairs(self.spark_conf))


@dataclass(frozen=True)
class ErrorRate:
    """How many rejected photos are too many."""

    max_error_rate: Annotated[
        float, Option(help="Share of rejected photos above which the exit code is 3.")
    ] = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.max_error_rate <= 1:
            raise RequestError(f"--max-error-rate is between 0 and 1, not {self.max_error_rate:g}")

    def exit_if_above(self, record: dict[str, Any]) -> None:
        """End with exit code 3 if too many of a record's photos were rejected."""
        from pomona.pipeline.extract import rejected_share

        share = rejected_share(record)
        if share > self.max_error_rate:
            typer.echo(
                f"pomona: {share:.1%} of the photos can't be used, more than --max-error-rate "
                f"{self.max_error_rate:.1%}{': see rejected.csv' if 'digests' in record else ''}",
                err=True,
            )
            raise typer.Exit(TOO_MANY_REJECTED)


def spark_pairs(settings: list[str] | None) -> tuple[tuple[str, str], ...]:
    """Return the keys and values of ``--spark-conf``."""
    for setting in settings or ():
        if "=" not in setting:
            raise RequestError(f"--spark-conf is KEY=VALUE, not {setting}")
    pairs = [setting.split("=", 1) for setting in settings or ()]
    return tuple((key, value) for key, value in pairs)
