"""How commands are declared: the app, its groups, dataclasses as options, and shared options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from inspect import Parameter
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer import Argument, Option
from typer.core import TyperGroup

import pomona
from pomona.core.errors import RequestError

MODEL = "Make a model"
PHOTOS = "Look at photos"
ANSWER = "Answer"
OPERATE = "Publish and operate"
MOVE = "Move and erase"
GROUPS = (MODEL, PHOTOS, ANSWER, OPERATE, MOVE)
"""The groups of commands, in the order of ``pomona --help`` and docs/cli.md."""


class GroupedCommands(TyperGroup):
    """Lists the commands by their groups."""

    def by_group(self) -> dict[str, list[str]]:
        """Return the commands' names by group; within a group, in the order of declaration."""
        groups: dict[str, list[str]] = {group: [] for group in GROUPS}
        for name, one in self.commands.items():
            groups[getattr(one, "rich_help_panel", "")].append(name)
        return groups

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each group with its commands, a line each; Typer has groups only in colour."""
        widest = max(map(len, self.commands))
        limit = formatter.width - widest - 4  # two spaces before the name, two after it
        for group, names in self.by_group().items():
            lines = [(n.ljust(widest), self.commands[n].get_short_help_str(limit)) for n in names]
            with formatter.section(group):
                formatter.write_dl(lines)


app = typer.Typer(
    name="pomona",
    cls=GroupedCommands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Recognise fruit in photos at scale: photos become features, and features PCA features.",
)


def command(group: str) -> Callable[[Callable[..., None]], Any]:
    """Add a function to `app` as a command of a group; see `with_options` for its parameters."""
    return lambda body: app.command(rich_help_panel=group)(with_options(body))


def with_options(body: Callable[..., None]) -> Callable[..., None]:
    """Return ``body`` as Typer takes it, with an option for each field of its dataclasses.

    A parameter or field ``name: Annotated[type, "help"]`` becomes ``--name``; what isn't named so
    carries ``typer.Option`` or ``typer.Argument`` instead. ``body`` gets the dataclasses' objects.
    """
    parameters = _parameters(body)
    objects: dict[str, Any] = {
        name: one.annotation for name, one in parameters.items() if is_dataclass(one.annotation)
    }
    fields = {name: _parameters(kind) for name, kind in objects.items()}

    @functools.wraps(body)
    def call(**values: Any) -> None:
        for name, kind in objects.items():
            values[name] = kind(**{field: values.pop(field) for field in fields[name]})
        body(**values)

    flat = [p for name, one in parameters.items() for p in fields.get(name, {name: one}).values()]
    call.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    return call


def _parameters(function: Callable[..., Any]) -> dict[str, Parameter]:
    """Return the parameters of a function or dataclass, annotated as Typer takes them.

    All are by keyword, since an option with a default may stand before one without.
    """
    hints = get_type_hints(function, include_extras=True)
    return {
        name: one.replace(annotation=_option(name, hints[name]), kind=Parameter.KEYWORD_ONLY)
        for name, one in inspect.signature(function).parameters.items()
    }


def _option(name: str, annotation: Any) -> Any:
    kind, *extras = get_args(annotation) or (annotation,)
    if get_origin(annotation) is not Annotated or not isinstance(extras[0], str):
        return annotation
    names = [f"--{name.replace('_', '-')}"] if kind is bool else []  # without a --no- of its own
    return Annotated[kind, Option(*names, help=extras[0])]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pomona {pomona.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Take the options that come before a command."""


TOO_MANY_REJECTED = 3  # the exit code above --max-error-rate
SourceName = Annotated[str, Argument(help="A folder of photos, or a URI (s3://, gs://, hdfs://).")]
OutDir = Annotated[str, "Where the results go: a folder, or a URI (s3://, gs://)."]
LocalOut = Annotated[str, "The folder for the results."]
Device = Annotated[str, "auto, cpu or cuda."]
ImageSize = Annotated[int, "Side that photos are stretched to, in pixels."]
Label = Annotated[str, "parent: the photo's folder; top: the first folder under the split."]
TestFraction = Annotated[
    float | None, "Share that goes to Test, in a source without Training and Test folders."
]
Workers = Annotated[
    int | None, "Processes of this machine that work. [default: one per core; on a GPU two]"
]
Master = Annotated[
    str | None, "Run on Spark instead: its master (local[*], spark://, yarn, …) or sc://HOST:PORT."
]
SparkConf = Annotated[list[str] | None, "A setting of Spark, KEY=VALUE; repeatable."]
NoPlots = Annotated[bool, "Draw nothing, and write no report."]
CsvSafe = Annotated[
    bool, "In CSV, put ' before names that a spreadsheet would run: those beginning with = + - @."
]
NoMlflow = Annotated[bool, "Record nothing in MLflow."]
AsJson = Annotated[bool, Option("--json", help="Print JSON for machines.")]


@dataclass(frozen=True)
class ExtractArguments:
    """How photos become features."""

    weights: Annotated[
        str | None,
        "imagenet, fruits (in the package), random:SEED (untrained), or a .safetensors, .pth or "
        ".onnx file. [default: POMONA_WEIGHTS, or imagenet]",
    ] = None
    backend: Annotated[str, "onnx or torch."] = "onnx"
    device: Device = "auto"
    image_size: ImageSize = 224
    batch_size: Annotated[int | None, "Photos per network call. [default: 8, on a GPU 128]"] = None
    label: Label = "parent"
    test_fraction: TestFraction = None
    keep_deleted: Annotated[bool, "Keep the rows of photos that left the source."] = False
    source_moved: Annotated[bool, "The source of OUT's photos has a new address."] = False
    verify: Annotated[bool, "Compare digests of photos and table, not sizes and times alone."] = (
        False
    )
    reader: Annotated[str, "auto, or spark: through Spark's binaryFile, whatever the source."] = (
        "auto"
    )

    def options(self, *, csv_safe: bool = False) -> pomona.ExtractOptions:
        """Return the stage's options."""
        if self.reader not in ("auto", "spark"):
            raise RequestError(f"--reader is auto or spark, not {self.reader}")
        return pomona.ExtractOptions(**vars(self), csv_safe=csv_safe)


@dataclass(frozen=True)
class ReduceArguments:
    """How features become PCA features."""

    components: Annotated[str, "How many (50), or the share of the variance to keep (0.95)."] = "50"
    power: Annotated[float, "Raise features to this power first: 0.5, or 1 to leave them."] = 0.5
    no_scale: Annotated[bool, "Don't bring features to standard deviation 1 first."] = False
    whiten: Annotated[bool, "Bring pca_features to standard deviation 1."] = False

    def options(self, *, plots: bool, csv_safe: bool = False) -> pomona.ReduceOptions:
        """Return the stage's options."""
        from pomona.model.projection import parse_components

        components = parse_components(self.components)
        scale = not self.no_scale
        return pomona.ReduceOptions(components, scale, self.whiten, self.power, plots, csv_safe)


@dataclass(frozen=True)
class TrainArguments:
    """How PCA features become a model; the fields of `pomona.pipeline.train.TrainOptions`."""

    class_weight: Annotated[str, "none, or balanced: labels count the same in training."] = "none"
    max_rows: Annotated[int, "Most photos to train on: above, a sample stratified by label."] = (
        1_000_000
    )
    unknown: Annotated[
        str,
        "How photos of none of the labels are recognised: auto (the best on labels left out), "
        "max_probability, energy, distance or neighbours.",
    ] = "auto"
    keep: Annotated[float, "Share of known labels' photos that must not be called unknown."] = 0.95


@dataclass(frozen=True)
class SparkArguments:
    """Where tasks run, and how Spark is set."""

    workers: Workers = None
    master: Master = None
    spark_conf: SparkConf = None

    def cluster(self) -> pomona.Cluster:
        """Return the cluster that is asked for."""
        return cluster(self.workers, self.master, self.spark_conf)


@dataclass(frozen=True)
class ErrorRate:
    """How many rejected photos are too many."""

    max_error_rate: Annotated[float, "Rejected photos' share above which the exit code is 3."] = (
        0.05
    )

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


def cluster(
    workers: int | None, master: str | None, spark_conf: list[str] | None = None
) -> pomona.Cluster:
    """Return where tasks run; refuse options that don't go together."""
    if workers is not None and workers < 1:
        raise RequestError(f"--workers is at least 1, not {workers}")
    if workers is not None and master is not None:
        raise RequestError("--workers is for this machine's processes; Spark's are --master's")
    return pomona.Cluster(master, spark_pairs(spark_conf), workers=workers)


def spark_pairs(settings: list[str] | None) -> tuple[tuple[str, str], ...]:
    """Return the keys and values of ``--spark-conf``."""
    pairs = []
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise RequestError(f"--spark-conf is KEY=VALUE, not {setting}")
        pairs.append((key, value))
    return tuple(pairs)
