"""What the commands are declared with: the app, its groups, and dataclasses as options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from inspect import Parameter
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup

from pomona import __version__

MODEL = "Make a model"
PHOTOS = "Look at photos"
ANSWER = "Answer"
OPERATE = "Publish and operate"
MOVE = "Move and erase"
GROUPS = (MODEL, PHOTOS, ANSWER, OPERATE, MOVE)
"""The groups of commands, in the order of ``pomona --help`` and docs/cli.md."""

Body = TypeVar("Body", bound=Callable[..., None])


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
            lines = [self.commands[name].get_short_help_str(limit) for name in names]
            with formatter.section(group):
                formatter.write_dl(
                    [(name.ljust(widest), line) for name, line in zip(names, lines, strict=True)]
                )


app = typer.Typer(
    name="pomona",
    cls=GroupedCommands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Recognise fruit in photos at scale: photos become features, and features PCA features.",
)


def command(group: str) -> Callable[[Body], Body]:
    """Add a function to `app` as a command of a group; see `with_options` for its parameters."""

    def add(body: Body) -> Body:
        app.command(rich_help_panel=group)(with_options(body))
        return body

    return add


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
    return Annotated[kind, typer.Option(*names, help=extras[0])]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pomona {__version__}")
        raise typer.Exit


Version = typer.Option(
    "--version", callback=_print_version, is_eager=True, help="Show the version."
)


@app.callback()
def _main(version: Annotated[bool, Version] = False) -> None:
    """Take the options that come before a command."""
