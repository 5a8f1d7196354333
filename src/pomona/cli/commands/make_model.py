"""Make a model: every stage in one command, each stage on its own, and new weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from typer import Option

import pomona
from pomona.cli import render
from pomona.cli.options import (
    MODEL,
    AsJson,
    CsvSafe,
    Device,
    ErrorRate,
    ExtractArguments,
    ImageSize,
    Label,
    LocalOut,
    NoMlflow,
    NoPlots,
    OutDir,
    ReduceArguments,
    SourceName,
    SparkArguments,
    TestFraction,
    TrainArguments,
    command,
)
from pomona.cli.work import end_forget, log_to, progress, show, show_run, working_in
from pomona.core.printable import escaped
from pomona.core.uris import refuse_uri


@command(MODEL)
def run(
    source: SourceName,
    out: OutDir,
    *,
    extraction: ExtractArguments,
    reduction: ReduceArguments,
    no_train: Annotated[bool, "Train no classifier."] = False,
    training: TrainArguments,
    spark: SparkArguments,
    error_rate: ErrorRate,
    no_plots: NoPlots = False,
    no_mlflow: NoMlflow = False,
    csv_safe: CsvSafe = False,
    as_json: AsJson = False,
) -> None:
    """Run every stage: extract, reduce, train, report. What is there isn't computed again."""
    cluster = spark.cluster()
    reduce_options = reduction.options(plots=not no_plots, csv_safe=csv_safe)
    options = extraction.options(csv_safe=csv_safe), reduce_options
    train_options = None if no_train else pomona.TrainOptions(**vars(training))
    with working_in(out, source) as (home, on_tick):
        records = pomona.run(
            source, home.folder, *options, cluster, on_tick, train_options, home.after
        )
        end_forget(home.folder, on_tick, cluster)
        records["mlflow"] = "off" if no_mlflow else pomona.track(home.folder, records)
    show_run(records, home, as_json)
    error_rate.exit_if_above(records["extract"])


@command(MODEL)
def extract(
    source: SourceName,
    out: OutDir,
    extraction: ExtractArguments,
    spark: SparkArguments,
    error_rate: ErrorRate,
    csv_safe: CsvSafe = False,
    as_json: AsJson = False,
) -> None:
    """Turn photos into features. Killed, it goes on where it stopped."""
    options, cluster = extraction.options(csv_safe=csv_safe), spark.cluster()
    with working_in(out, source) as (home, on_tick):
        record = pomona.extract_features(source, home.folder, options, cluster, on_tick)
    show_run({"extract": record}, home, as_json)
    error_rate.exit_if_above(record)


@command(MODEL)
def reduce(
    out: OutDir,
    reduction: ReduceArguments,
    spark: SparkArguments,
    no_plots: NoPlots = False,
    csv_safe: CsvSafe = False,
    as_json: AsJson = False,
) -> None:
    """Turn features into PCA features. Power, scaler and PCA are fitted on Training."""
    options = reduction.options(plots=not no_plots, csv_safe=csv_safe)
    cluster = spark.cluster()
    with working_in(out) as (home, on_tick):
        record = pomona.reduce(home.folder, options, cluster, on_tick)
    show_run({"reduce": record}, home, as_json)


@command(MODEL)
def train(
    out: OutDir, training: TrainArguments, no_plots: NoPlots = False, as_json: AsJson = False
) -> None:
    """Train a model on PCA features, judge it, write the report."""
    with working_in(out) as (home, on_tick):
        record = pomona.train(home.folder, pomona.TrainOptions(**vars(training)), on_tick)
        if not no_plots:
            home.after("train")
            pomona.report(home.folder, on_tick)
    show_run({"train": record}, home, as_json)


@command(MODEL)
def report(out: OutDir) -> None:
    """Write OUT/report/report.html again, from what is in OUT."""
    with working_in(out) as (home, on_tick):
        path = pomona.report(home.folder, on_tick)
    typer.echo(escaped(home.shown(path)))


@dataclass(frozen=True)
class FinetuneArguments:
    """How the backbone is trained: fields of `pomona.pipeline.finetune.FinetuneOptions`."""

    start: Annotated[
        str | None,
        Option(
            "--from",
            help="Weights to start from: imagenet, fruits (in the package), random:SEED, or a "
            ".safetensors or .pth file. [default: POMONA_WEIGHTS, or imagenet]",
        ),
    ] = None
    epochs: Annotated[float | None, "Passes over photos. [default: 20, unless --minutes]"] = None
    minutes: Annotated[float | None, "Time limit, decoding included."] = None
    device: Device = "auto"
    image_size: ImageSize = 224
    label: Label = "parent"
    test_fraction: TestFraction = None
    batch_size: Annotated[int, "Photos per step, over all processes."] = 32
    precision: Annotated[str, "float32, mixed (bfloat16) or auto: mixed if a GPU has it."] = "auto"
    teacher: Annotated[
        str | None,
        "Weights whose features are to be matched, too: named as for --from, or none. "
        "[default: those of --from, if they are trained]",
    ] = None
    seed: Annotated[int, "On one device, it decides the result."] = 0
    hold_out: Annotated[
        float,
        "Share of each label's groups (of its photos, where it has one group) that "
        "training doesn't see: they choose the best weights. 0: the last ones are kept.",
    ] = 0.2
    processes: Annotated[int, "How many processes train together, by Spark's TorchDistributor."] = 1


@command(MODEL)
def finetune(
    source: SourceName,
    out: LocalOut,
    tuning: FinetuneArguments,
    spark: SparkArguments,
    error_rate: ErrorRate,
    no_mlflow: NoMlflow = False,
    as_json: AsJson = False,
) -> None:
    """Train the backbone on photos. --weights OUT/weights.safetensors takes the result."""
    from pomona.pipeline.finetune import FinetuneOptions, finetune, track

    refuse_uri(out, "--out")
    options, cluster = FinetuneOptions(**vars(tuning)), spark.cluster()
    with progress() as on_tick, log_to(out):
        record = finetune(source, out, options, cluster, on_tick)
        record["mlflow"] = "off" if no_mlflow else track(out, record)
    show(record, as_json, render.finetuned)
    error_rate.exit_if_above(record)
