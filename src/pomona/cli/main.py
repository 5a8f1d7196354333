"""The command ``pomona``: parse, call, print. Everything else is imported when a command runs."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pomona.cli import cloud
from pomona.cli import options as options_module
from pomona.cli.options import (
    AModel,
    AsJson,
    Backend,
    BatchSize,
    ClassWeight,
    Components,
    Device,
    ImageSize,
    Keep,
    KeepDeleted,
    Label,
    LocalOut,
    Master,
    MaxErrorRate,
    MaxRows,
    NoMlflow,
    NoPlots,
    NoScale,
    NoTrain,
    OutDir,
    Power,
    Reader,
    Source,
    SourceMoved,
    SparkConf,
    TestFraction,
    Unknown,
    Weights,
    Whiten,
)
from pomona.core.errors import MissingError, PomonaError, RequestError

app = typer.Typer(
    name="pomona",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Recognise fruit in photos at scale: photos become features, and features PCA features.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from pomona import __version__

        typer.echo(f"pomona {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Take the options that come before a command."""


@app.command()
def run(
    source: Source,
    out: OutDir,
    weights: Weights = None,
    backend: Backend = "onnx",
    device: Device = "auto",
    image_size: ImageSize = 224,
    batch_size: BatchSize = None,
    label: Label = "parent",
    test_fraction: TestFraction = None,
    components: Components = "50",
    power: Power = 0.5,
    no_scale: NoScale = False,
    whiten: Whiten = False,
    no_train: NoTrain = False,
    class_weight: ClassWeight = "none",
    max_rows: MaxRows = 1_000_000,
    unknown: Unknown = "auto",
    keep: Keep = 0.95,
    no_plots: NoPlots = False,
    no_mlflow: NoMlflow = False,
    keep_deleted: KeepDeleted = False,
    source_moved: SourceMoved = False,
    reader: Reader = "auto",
    master: Master = "local[*]",
    spark_conf: SparkConf = None,
    max_error_rate: MaxErrorRate = 0.05,
    as_json: AsJson = False,
) -> None:
    """Do every stage: extract, reduce, train, report. What is there isn't computed again."""
    from pomona.pipeline import run as run_module
    from pomona.pipeline import train as train_module

    options = None if no_train else train_module.TrainOptions(class_weight, max_rows, unknown, keep)
    with (
        options_module.progress() as on_progress,
        options_module.at(out, on_progress, source) as home,
    ):
        on_tick = home.ticks(on_progress)
        records = run_module.run(
            source,
            home.folder,
            options_module.extract_options(locals()),
            options_module.reduce_options(components, no_scale, whiten, power, no_plots),
            options_module.cluster(master, spark_conf),
            on_tick,
            options,
            home.after,
        )
        options_module.end_forget(home.folder, on_tick, options_module.cluster(master, spark_conf))
        records["mlflow"] = "off" if no_mlflow else run_module.track(home.folder, records)
    options_module.show_run(records, home, as_json)
    options_module.exit_by(records["extract"], max_error_rate)


@app.command()
def extract(
    source: Source,
    out: OutDir,
    weights: Weights = None,
    backend: Backend = "onnx",
    device: Device = "auto",
    image_size: ImageSize = 224,
    batch_size: BatchSize = None,
    label: Label = "parent",
    test_fraction: TestFraction = None,
    keep_deleted: KeepDeleted = False,
    source_moved: SourceMoved = False,
    reader: Reader = "auto",
    master: Master = "local[*]",
    spark_conf: SparkConf = None,
    max_error_rate: MaxErrorRate = 0.05,
    as_json: AsJson = False,
) -> None:
    """Turn photos into features. Killed, it goes on where it stopped."""
    from pomona.pipeline import extract as extract_module

    given = options_module.extract_options(locals())
    with (
        options_module.progress() as on_progress,
        options_module.at(out, on_progress, source) as home,
    ):
        on_tick = home.ticks(on_progress)
        cluster = options_module.cluster(master, spark_conf)
        record = extract_module.extract(source, home.folder, given, cluster, on_tick)
    options_module.show_run({"extract": record}, home, as_json)
    options_module.exit_by(record, max_error_rate)


@app.command()
def reduce(
    out: OutDir,
    components: Components = "50",
    power: Power = 0.5,
    no_scale: NoScale = False,
    whiten: Whiten = False,
    no_plots: NoPlots = False,
    master: Master = "local[*]",
    spark_conf: SparkConf = None,
    as_json: AsJson = False,
) -> None:
    """Turn features into PCA features: power, scaler and PCA, fitted on Training."""
    from pomona.pipeline import reduce as reduce_module

    options = options_module.reduce_options(components, no_scale, whiten, power, no_plots)
    with options_module.progress() as on_progress, options_module.at(out, on_progress) as home:
        on_tick = home.ticks(on_progress)
        record = reduce_module.reduce(
            home.folder, options, options_module.cluster(master, spark_conf), on_tick
        )
    options_module.show_run({"reduce": record}, home, as_json)


@app.command()
def train(
    out: OutDir,
    class_weight: ClassWeight = "none",
    max_rows: MaxRows = 1_000_000,
    unknown: Unknown = "auto",
    keep: Keep = 0.95,
    no_plots: NoPlots = False,
    as_json: AsJson = False,
) -> None:
    """Turn PCA features into a model, judge it, and write the report."""
    from pomona.pipeline import run as run_module
    from pomona.pipeline import train as train_module

    options = train_module.TrainOptions(class_weight, max_rows, unknown, keep)
    with options_module.progress() as on_progress, options_module.at(out, on_progress) as home:
        on_tick = home.ticks(on_progress)
        record = train_module.train(home.folder, options, on_tick)
        if not no_plots:
            home.after("train")
            run_module.report(home.folder, on_tick)
    options_module.show_run({"train": record}, home, as_json)


@app.command()
def report(out: OutDir) -> None:
    """Write OUT/report/report.html again, from what there is in OUT."""
    from pomona.pipeline import run as run_module

    with options_module.progress() as on_progress, options_module.at(out, on_progress) as home:
        on_tick = home.ticks(on_progress)
        path = run_module.report(home.folder, on_tick)
    typer.echo(home.shown(path))


@app.command()
def predict(
    photos: Annotated[
        list[str],
        typer.Argument(help="Photos, folders, URIs (s3://, gs://), or - for standard input."),
    ],
    model: AModel = None,
    top: Annotated[int, typer.Option(help="How many labels to give for each photo.")] = 3,
    out: Annotated[
        str | None, typer.Option("--out", help="A new folder that takes the answers, as Parquet.")
    ] = None,
    device: Device = "auto",
    master: Annotated[
        str | None,
        typer.Option(
            help="Spark's master, or sc://HOST:PORT. [default: local[*] above 2,000 photos, else "
            "no Spark]"
        ),
    ] = None,
    spark_conf: SparkConf = None,
    max_error_rate: MaxErrorRate = 0.05,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV with a header.")] = False,
) -> None:
    """Tell what is on photos. Killed, with --out, it goes on where it stopped."""
    from pomona.cli import answers, render
    from pomona.core.uris import refuse_uri
    from pomona.pipeline import predict as predict_module

    if out:
        refuse_uri(out, "--out")
    if as_json and as_csv:
        raise RequestError("--json or --csv, not both")
    options_module.check_rate(max_error_rate)
    conf = options_module.cluster(master or "", spark_conf).conf
    most = None if as_json or as_csv else predict_module.SPARK_ABOVE
    options = predict_module.PredictOptions(top, device, out, most, master, conf)
    found = _model(model)
    if model is None:
        typer.echo(f"pomona: {render.which(found)}", err=True)
    printer = answers.printer(sys.stdout, found, as_json=as_json, as_csv=as_csv)
    with printer as show, options_module.progress() as on_tick:
        record = predict_module.predict(photos, found, options, on_tick, show)
    if out:
        options_module.show(record, as_json, answers.summary)
    options_module.exit_by(record, max_error_rate)


@app.command()
def serve(
    model: AModel = None,
    host: Annotated[str, typer.Option(help="The address to answer at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0: any that is free.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="A key that requests must bring; repeatable. Others on this machine can see it: "
            "POMONA_API_KEYS (with commas between) is better."
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Answer everybody who reaches --host, without a key.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Photos in work at a time. [default: one per core]")
    ] = None,
    queue: Annotated[
        int | None,
        typer.Option(help="Photos that may wait; beyond, 503. [default: 16 for each worker]"),
    ] = None,
    max_mb: Annotated[float, typer.Option(help="Size of a request, in MB.")] = 20,
    max_photos: Annotated[int, typer.Option(help="Photos in a request.")] = 16,
    max_megapixels: Annotated[
        float,
        typer.Option(help="Pixels of a photo, in millions; JPEGs are decoded at a fraction."),
    ] = 24,
    watch: Annotated[
        float, typer.Option(help="Seconds between looks for another model; 0: none.")
    ] = 0,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="A web site whose pages may ask (CORS), https://…; repeatable."),
    ] = None,
    isolate: Annotated[
        bool,
        typer.Option(
            "--isolate",
            help="Decode in child processes: a photo that crashes or stalls the decoder costs "
            "itself alone.",
        ),
    ] = False,
    device: Device = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="No access log.")] = False,
) -> None:
    """Answer over HTTP, with a page to try it. Ends calmly on Ctrl-C or SIGTERM."""
    try:
        from pomona.serving import server, uploads
        from pomona.serving.app import Settings, create
    except ImportError as error:
        raise MissingError(
            f"serve needs more packages ({error.name}): pip install 'pomona[serve]'"
        ) from error
    counts = [number for number in (workers, queue, max_photos) if number is not None]
    if min(counts) < 1 or not 0 < max_mb <= 128 or not 0 < max_megapixels <= 64 or watch < 0:
        raise RequestError(
            "--workers, --queue and --max-photos are at least 1, --max-mb is above 0 and up to "
            "128, --max-megapixels above 0 and up to 64, --watch isn't negative"
        )
    keys = tuple(api_key or ()) + tuple(filter(None, _split(os.environ.get("POMONA_API_KEYS"))))
    server.check_access(host, keys, public=public)
    server.log_to_stderr(access=not quiet)
    limits = uploads.Limits(int(max_mb * 1_000_000), max_photos)
    settings = Settings(
        keys,
        limits,
        queue,
        workers,
        device,
        watch,
        tuple(allow_origin or ()),
        "child" if isolate else "",
        int(max_megapixels * 1e6),
    )
    with server.listen(host, port) as opened:
        made = create(lambda: _model(model), settings)
        server.serve(made, opened, lambda: _print_started(made, server.address(opened)))


def _split(keys: str | None) -> list[str]:
    return [key.strip() for key in (keys or "").split(",")]


def _print_started(made: Any, address: str) -> None:
    from pomona.cli import render

    text = render.served(made.state.service.pool.loaded.model, address)
    typer.echo(text, err=True)


@app.command()
def finetune(
    source: Source,
    out: LocalOut,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Weights to start from: imagenet, fruits (in the package), random:SEED, or a "
            ".safetensors or .pth file. "
            "[default: POMONA_WEIGHTS, or imagenet]",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the photos. [default: 20, unless --minutes]")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="The time there is, decoding included.")
    ] = None,
    device: Device = "auto",
    image_size: ImageSize = 224,
    label: Label = "parent",
    test_fraction: TestFraction = None,
    batch_size: Annotated[int, typer.Option(help="Photos per step, over all processes.")] = 32,
    precision: Annotated[
        str, typer.Option(help="float32, mixed (bfloat16), or auto: mixed on a GPU that has it.")
    ] = "auto",
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Weights whose features are to be matched, too: named as for --from, or none. "
            "[default: those of --from, if they are trained]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="On one device, it decides the result.")] = 0,
    hold_out: Annotated[
        float,
        typer.Option(
            help="Share of each label's groups (of its photos, where it has one group) that "
            "training doesn't see: they choose the best weights. 0: the last ones are kept."
        ),
    ] = 0.2,
    processes: Annotated[
        int, typer.Option(help="How many train together, by Spark's TorchDistributor.")
    ] = 1,
    master: Master = "local[*]",
    spark_conf: SparkConf = None,
    no_mlflow: NoMlflow = False,
    max_error_rate: MaxErrorRate = 0.05,
    as_json: AsJson = False,
) -> None:
    """Train the weights themselves on photos: --weights OUT/weights.safetensors takes them."""
    from pomona.cli import render
    from pomona.core.uris import refuse_uri
    from pomona.pipeline import finetune as finetune_module

    refuse_uri(out, "--out")
    given = locals()
    options_module.check_rate(max_error_rate)
    options = finetune_module.FinetuneOptions(
        **{name: given[name] for name in finetune_module.OPTIONS if name in given}
    )
    with options_module.progress() as on_tick, options_module.log_to(out):
        cluster = options_module.cluster(master, spark_conf)
        record = finetune_module.finetune(source, out, options, cluster, on_tick)
        record["mlflow"] = "off" if no_mlflow else finetune_module.track(out, record)
    options_module.show(record, as_json, render.finetuned)
    options_module.exit_by(record, max_error_rate)


@app.command()
def export(
    out: OutDir,
    int8: Annotated[bool, typer.Option("--int8", help="8-bit integers too, if they pass.")] = False,
    half: Annotated[
        bool, typer.Option("--half", help="Half-precision weights too, if they pass.")
    ] = False,
    dest: Annotated[
        str | None, typer.Option(help="The folder that takes the files. [default: OUT/export]")
    ] = None,
    calibration: Annotated[
        int, typer.Option(help="Training photos that 8-bit ranges are measured on.")
    ] = 256,
    held_out: Annotated[
        int, typer.Option(help="Photos that smaller files are judged by, at most.")
    ] = 2000,
    web: Annotated[
        str | None,
        typer.Option(help="A new folder for the page that runs the smallest file, for any host."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write files for the phone; a smaller one only if it answers like the model."""
    from pomona.cli import render
    from pomona.export import export as export_module

    options = export_module.ExportOptions(int8, half, dest, calibration, held_out, web)
    with options_module.progress() as on_progress, options_module.at(out, on_progress) as home:
        on_tick = home.ticks(on_progress)
        record = export_module.export(home.folder, options, on_tick)
    options_module.show(
        {**record, "folder": home.shown(record["folder"])}, as_json, render.exported
    )


@app.command()
def publish(
    out: OutDir,
    name: Annotated[str, typer.Option(help="The model's name in MLflow's registry.")] = "pomona",
    promote: Annotated[
        str | None, typer.Option(help="Make it the champion whatever the comparison says: why.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Register OUT/model in MLflow: challenger, and champion if it beats the present one."""
    from pomona.cli import render
    from pomona.registry import publish as publish_module

    options = publish_module.PublishOptions(name, promote)
    with options_module.progress() as on_progress, options_module.at(out, on_progress) as home:
        on_tick = home.ticks(on_progress)
        record = publish_module.publish(home.folder, options, on_tick)
    options_module.show(record, as_json, render.published)


app.add_typer(cloud.cloud, name="cloud")


@app.command()
def forget(
    out: OutDir,
    photos: Annotated[
        list[str] | None,
        typer.Argument(
            help="Paths as in the column path, or patterns in quotes: * stays within a folder, ** "
            "crosses folders. Without any, a forget that was killed is ended."
        ),
    ] = None,
    listed: Annotated[
        str | None,
        typer.Option("--list", help="A file with one exact path a line; - for standard input."),
    ] = None,
    allow: Annotated[
        bool, typer.Option("--allow", help="The other way: extract may take these photos again.")
    ] = False,
    no_rebuild: Annotated[
        bool,
        typer.Option(
            "--no-rebuild", help="Remove what was made from the photos; don't make it again."
        ),
    ] = False,
    retire: Annotated[
        bool,
        typer.Option(
            "--retire", help="Delete the versions in OUT/mlflow.db that were trained with them."
        ),
    ] = False,
    missing_ok: Annotated[
        bool,
        typer.Option("--missing-ok", help="Take exact paths that are in no table and no source."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would go, and change nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    master: Master = "local[*]",
    spark_conf: SparkConf = None,
    as_json: AsJson = False,
) -> None:
    """Erase photos from all of OUT, and never take them in again. See docs/privacy.md."""
    from dataclasses import replace

    from pomona.cli import render
    from pomona.privacy import forget as forget_module

    named = (*(photos or ()), *(forget_module.read_list(listed) if listed else ()))
    if named and not (allow or yes or dry_run or (sys.stdin.isatty() and listed != "-")):
        raise RequestError("forget can't be undone, and there is nobody to ask: add --yes")
    options = forget_module.ForgetOptions(
        named[len(photos or ()) :], not no_rebuild, retire, missing_ok, dry_run
    )
    with options_module.opened(out, lambda tick: None) as home:
        if allow:
            options_module.show(forget_module.allow(home.folder, named), as_json, render.allowed)
            return
        if named and not (yes or dry_run):  # before the bar, which would write over the question
            plan = forget_module.forget(home.folder, photos or (), replace(options, dry_run=True))
            if not as_json:
                options_module.show(plan, False, render.forget_plan)
            typer.confirm("This can't be undone. Forget them?", abort=True, err=True)
        with options_module.progress() as on_progress, options_module.log_to(home.folder):
            cluster, on_tick = options_module.cluster(master, spark_conf), home.ticks(on_progress)
            record = forget_module.forget(
                home.folder, photos or (), options, cluster, on_tick, home.after
            )
    options_module.show(record, as_json, render.forget_plan if dry_run else render.forgotten)


def _model(name: str | None) -> Any:
    from pomona.core.uris import is_store
    from pomona.model import artifact

    if name is None:
        return artifact.load_model(artifact.PACKAGED)
    if is_store(name):
        from pomona.workspace.remote import fetch_model

        return artifact.load_model(fetch_model(name))
    if name.startswith(("models:/", "runs:/")):
        from pomona.registry.publish import fetch

        return artifact.load_model(fetch(name))
    return artifact.load_model(name)


@app.command()
def status(out: OutDir, as_json: AsJson = False) -> None:
    """Show how far OUT is: photos, done, rejected by code, what is still to do."""
    from pomona.cli import render
    from pomona.pipeline import status as status_module

    with (
        options_module.progress() as on_tick,
        options_module.opened(out, on_tick, look_only=True) as home,
    ):
        found = status_module.status(home.folder)
    found["running"] |= home.running
    options_module.show(found, as_json, render.status)


@app.command()
def push(
    out: Annotated[str, typer.Argument(help="The folder of a finished run.")],
    place: Annotated[str, typer.Argument(help="Where to: a URI (s3://, gs://), or a folder.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="The place may hold what another OUT pushed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy OUT to an object store: only what isn't there. Killed, it goes on."""
    from pomona.cli import render
    from pomona.workspace import remote

    with options_module.progress() as on_tick:
        record = remote.push(out, place, on_tick, replace=replace)
    options_module.show(record, as_json, render.moved)


@app.command()
def pull(
    place: Annotated[str, typer.Argument(help="Where OUT was pushed to.")],
    out: Annotated[str, typer.Argument(help="The folder that takes it.")],
    as_json: AsJson = False,
) -> None:
    """Copy OUT from where it was pushed to, and check every file. Killed, it goes on."""
    from pomona.cli import render
    from pomona.workspace import remote

    with options_module.progress() as on_tick:
        record = remote.pull(place, out, on_tick)
    options_module.show(record, as_json, render.moved)


@app.command()
def inspect(source: Source, label: Label = "parent", as_json: AsJson = False) -> None:
    """Show what is in a source, before a long run."""
    from pomona.cli import render
    from pomona.photos import inspect as inspect_module

    with options_module.progress() as on_tick:
        where, listing = options_module.listed(source, on_tick)
        found = inspect_module.inspect(
            where,
            listing,
            label,
            lambda done, total: on_tick(options_module.tick("inspect", done, total)),
        )
    options_module.show(found, as_json, render.inspection)


@app.command()
def subset(
    source: Source,
    dest: Annotated[Path, typer.Argument(help="A new folder.")],
    percentage: Annotated[
        float, typer.Option(help="Share of the photos to take, in percent.")
    ] = 10,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the photos; links otherwise.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a smaller source, stratified by split and label, with at least one photo of each."""
    from pomona.photos import subset as subset_module

    with options_module.progress() as on_tick:
        where, listing = options_module.listed(source, on_tick)
        count = subset_module.subset(where, listing, dest, percentage, copy=copy)
    options_module.show(
        {"photos": count, "of": listing.files.num_rows, "dest": str(dest)},
        as_json,
        lambda r: f"{r['photos']:,} of {r['of']:,} photos in {r['dest']}",
    )


@app.command()
def synthesize(
    dest: Annotated[Path, typer.Argument(help="The folder that takes the photos.")],
    classes: Annotated[int, typer.Option(help="How many labels, 1 to 131.")] = 131,
    images: Annotated[int, typer.Option(help="How many photos.")] = 90_483,
    seed: Annotated[int, typer.Option(help="The same seed gives the same photos.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes. [default: one per core]")] = None,
    as_json: AsJson = False,
) -> None:
    """Render photos of fruit on a turntable, with Fruits-360's folders and names."""
    from pomona.photos import synthetic

    with options_module.progress() as on_tick:
        count = synthetic.synthesize(
            dest,
            classes=classes,
            images=images,
            seed=seed,
            workers=workers,
            progress=lambda done, total: on_tick(options_module.tick("synthesize", done, total)),
        )
    options_module.show(
        {"photos": count, "dest": str(dest)}, as_json, lambda r: f"{count:,} photos in {dest}"
    )


@app.command()
def demo(
    out: LocalOut = "demo",
    classes: Annotated[int, typer.Option(help="How many labels to render.")] = 12,
    images: Annotated[int, typer.Option(help="How many photos to render.")] = 600,
    master: Master = "local[*]",
    as_json: AsJson = False,
) -> None:
    """Render photos, some of them damaged, and run. Needs no network and no downloaded weights."""
    from pomona.core.uris import refuse_uri
    from pomona.photos import synthetic
    from pomona.pipeline import extract as extract_module
    from pomona.pipeline import reduce as reduce_module
    from pomona.pipeline import run as run_module
    from pomona.pipeline import train as train_module
    from pomona.workspace.remote import Home

    refuse_uri(out, "--out")
    photos, results = Path(out) / "photos", Path(out) / "out"
    with options_module.progress() as on_tick, options_module.log_to(str(results)):
        synthetic.synthesize(
            photos,
            classes=classes,
            images=images,
            progress=lambda done, total: on_tick(options_module.tick("synthesize", done, total)),
        )
        synthetic.breakage(photos)
        options = extract_module.ExtractOptions(weights="fruits")
        cluster = options_module.cluster(master, None)
        records = run_module.run(
            photos,
            results,
            options,
            reduce_module.ReduceOptions(),
            cluster,
            on_tick,
            train_module.TrainOptions(),
        )
        records["mlflow"] = run_module.track(results, records)
    options_module.show_run(records, Home(str(results), str(results)), as_json)


INTERRUPTED = 130
"""As shells have it: 128 and SIGINT."""


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def main() -> None:
    """Run the command. Errors become one line and an exit code."""
    logging.raiseExceptions = False  # a log that can't be written (a full disk) isn't the error
    signal.signal(signal.SIGTERM, _interrupt)  # a container's stop is a Ctrl-C
    try:
        # Typer returns the code of an Exit, and makes one of an interrupt.
        code = app(standalone_mode=False) or 0
    except PomonaError as error:
        typer.echo(f"pomona: {' '.join(str(error).split())}", err=True)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if not hasattr(error, "show"):  # not a usage error of the command line
            raise
        error.show()
        code = 2
    if code == INTERRUPTED:
        typer.echo("pomona: stopped; run the same command again to go on", err=True)
    sys.exit(code)
