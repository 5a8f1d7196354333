"""What commands share: options, progress, what they print, and the log in OUT."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from pomona.core.errors import BusyError, JobError, PomonaError, RequestError

TOO_MANY_REJECTED = 3

Source = Annotated[
    str, typer.Argument(help="A folder of photos, or a URI (s3://, gs://, hdfs://).")
]
OutDir = Annotated[
    str,
    typer.Option("--out", help="What takes the results: a folder, or a URI (s3://, gs://)."),
]
LocalOut = Annotated[str, typer.Option("--out", help="The folder that takes the results.")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="imagenet, fruits (in the package), random:SEED (untrained), or a .safetensors, "
        ".pth or .onnx file. "
        "[default: POMONA_WEIGHTS, or imagenet]",
        show_default=False,
    ),
]
Backend = Annotated[str, typer.Option(help="onnx or torch.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
ImageSize = Annotated[int, typer.Option(help="Side that photos are stretched to, in pixels.")]
BatchSize = Annotated[
    int | None, typer.Option(help="Photos per call of the network. [default: 8, on a GPU 128]")
]
Label = Annotated[
    str, typer.Option(help="parent: the photo's folder; top: the first folder under the split.")
]
TestFraction = Annotated[
    float | None,
    typer.Option(help="Share that goes to Test, in a source without Training and Test folders."),
]
Master = Annotated[
    str, typer.Option(help="Spark's master, or sc://HOST:PORT, unless a session is active.")
]
SparkConf = Annotated[
    list[str] | None,
    typer.Option("--spark-conf", help="A setting of Spark, KEY=VALUE; repeatable."),
]
MaxErrorRate = Annotated[
    float, typer.Option(help="Share of rejected photos above which the exit code is 3.")
]
KeepDeleted = Annotated[
    bool, typer.Option("--keep-deleted", help="Keep the rows of photos that left the source.")
]
SourceMoved = Annotated[
    bool, typer.Option("--source-moved", help="The photos of OUT lie at another place now.")
]
Reader = Annotated[
    str, typer.Option(help="auto, or spark: read through Spark's binaryFile, whatever the source.")
]
Components = Annotated[
    str, typer.Option(help="How many (50), or the share of the variance to keep (0.95).")
]
NoScale = Annotated[
    bool, typer.Option("--no-scale", help="Don't bring features to standard deviation 1 first.")
]
Whiten = Annotated[
    bool, typer.Option("--whiten", help="Bring pca_features to standard deviation 1.")
]
Power = Annotated[
    float, typer.Option(help="Raise features to this power first: 0.5, or 1 to leave them.")
]
ClassWeight = Annotated[
    str, typer.Option(help="none, or balanced: each label weighs the same in training.")
]
MaxRows = Annotated[
    int, typer.Option(help="Photos to train on at most: above, a sample stratified by label.")
]
Unknown = Annotated[
    str,
    typer.Option(
        help="How photos of something else are told: auto (the best on labels left out), "
        "max_probability, energy, distance or neighbours."
    ),
]
Keep = Annotated[
    float, typer.Option(help="Share of photos of known labels that must not be called unknown.")
]
NoTrain = Annotated[bool, typer.Option("--no-train", help="Train no classifier.")]
NoPlots = Annotated[bool, typer.Option("--no-plots", help="Draw nothing, and write no report.")]
NoMlflow = Annotated[bool, typer.Option("--no-mlflow", help="Record nothing in MLflow.")]
AModel = Annotated[
    str | None,
    typer.Option(
        help="A model: OUT/model, its URI (s3://, gs://), or models:/NAME@champion. [default: the "
        "one in the package]",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def end_forget(out: str, on_tick: Any, cluster: Any = None) -> bool:
    """End a forget that was killed: its rows, and with ``cluster`` what is made from the rest.

    Returns whether something may have changed.
    """
    from pomona.core.uris import local_path
    from pomona.workspace import tombstones
    from pomona.workspace.layout import Out

    found = Out(local_path(out))
    if tombstones.pending_file(found).exists() or found.journal.exists():
        from pomona.privacy import forget

        forget.finish(out, cluster, on_tick, rebuild=cluster is not None)
        return True
    return False


def tick(stage: str, done: int, total: int) -> Any:
    """Return a tick; its class is imported when it is needed."""
    from pomona.core.progress import Tick

    return Tick(stage, done, total)


def extract_options(given: dict[str, Any]) -> Any:
    """Return the options of extract from a command's parameters."""
    from dataclasses import fields

    from pomona.pipeline.extract import ExtractOptions

    if given["reader"] not in ("auto", "spark"):
        raise RequestError(f"--reader is auto or spark, not {given['reader']}")
    check_rate(given["max_error_rate"])
    return ExtractOptions(**{field.name: given[field.name] for field in fields(ExtractOptions)})


def check_rate(rate: float) -> None:
    """Refuse a ``--max-error-rate`` that is no share."""
    if not 0 <= rate <= 1:
        raise RequestError(f"--max-error-rate is between 0 and 1, not {rate:g}")


def reduce_options(
    components: str, no_scale: bool, whiten: bool, power: float, no_plots: bool
) -> Any:
    """Return the options of reduce from a command's parameters."""
    from pomona.model.projection import parse_components
    from pomona.pipeline.reduce import ReduceOptions

    return ReduceOptions(parse_components(components), not no_scale, whiten, power, not no_plots)


def cluster(master: str, settings: list[str] | None) -> Any:
    """Return the cluster that ``--master`` and ``--spark-conf`` ask for."""
    from pomona.spark.session import Cluster

    for setting in settings or []:
        if "=" not in setting:
            raise RequestError(f"--spark-conf is KEY=VALUE, not {setting}")
    pairs = [setting.split("=", 1) for setting in settings or []]
    return Cluster(master, tuple((key, value) for key, value in pairs))


def listed(source: str, on_tick: Any) -> Any:
    """Return the source and its listing."""
    from pomona.photos.listing import list_files
    from pomona.photos.source import open_source

    where = open_source(source)
    if where.kind == "hadoop":
        raise RequestError(f"{source}: this command reads local folders, s3:// and gs://")
    return where, list_files(where, lambda count: on_tick(tick("list", count, 0)))


@contextlib.contextmanager
def progress() -> Iterator[Any]:
    """Show progress on stderr; gives the function that takes ticks."""
    from pomona.cli.render import progress

    with progress(sys.stderr) as on_tick:
        yield on_tick


def opened(out: str, on_tick: Any, source: str | None = None, *, look_only: bool = False) -> Any:
    """Open OUT, wherever it is; with ``look_only`` nothing there changes."""
    from pomona.workspace import remote

    return remote.opened(out, on_tick, source=source, look_only=look_only)


@contextlib.contextmanager
def at(out: str, on_tick: Any, source: str | None = None) -> Iterator[Any]:
    """Give the folder to work in, wherever OUT is, with a log in it."""
    with opened(out, on_tick, source) as home, log_to(home.folder):
        if end_forget(home.folder, on_tick):
            home.after("forget")
        yield home


@contextlib.contextmanager
def log_to(out: str) -> Iterator[None]:
    """Keep a log in OUT; a bug leaves its traceback there and one line on the terminal."""
    from pomona.core.uris import local_path
    from pomona.workspace.layout import open_out

    log = logging.getLogger("pomona")
    existed = local_path(out).exists()
    folder = open_out(out)
    handler = logging.FileHandler(folder.log, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    except BusyError:
        raise
    except RequestError:
        if not existed and not folder.table_file.exists():
            shutil.rmtree(folder.root, ignore_errors=True)  # it leaves nothing behind
        raise
    except PomonaError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise JobError(
                f"No space left on {folder.root}: free some, and run the same command again to go "
                "on; what is done is kept"
            ) from error
        log.exception("a bug")
        raise PomonaError(
            f"a bug in Pomona ({type(error).__name__}); the traceback is in {folder.log}"
        ) from error
    finally:
        log.removeHandler(handler)
        handler.close()


def show(found: dict[str, Any], as_json: bool, to_text: Any) -> None:
    """Print a record: as one line of JSON, or as ``to_text`` puts it."""
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, sort_keys=True))
        return
    from rich.console import Console

    terminal = sys.stdout.isatty()  # elsewhere nothing is folded: a path stays in one piece
    console = Console(width=None if terminal else 1000, emoji=False)
    console.print(to_text(found), markup=False, highlight=False)


def show_run(records: dict[str, Any], home: Any, as_json: bool) -> None:
    """Print what a run came to."""
    from pomona.cli import render

    show(records, as_json, lambda found: render.summary(found, home.name, home.folder))


def exit_by(record: dict[str, Any], max_error_rate: float) -> None:
    """End with exit code 3 if too many photos were rejected."""
    from pomona.pipeline.extract import rejected_share

    share = rejected_share(record)
    if share > max_error_rate:
        typer.echo(
            f"pomona: {share:.1%} of the photos can't be used, more than --max-error-rate "
            f"{max_error_rate:.1%}{': see rejected.csv' if 'digests' in record else ''}",
            err=True,
        )
        raise typer.Exit(TOO_MANY_REJECTED)
