"""What the commands are declared with: the app, its groups, and dataclasses as options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from inspect import Parameter
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from typer.core import TyperGroup

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
    """Return ``body`` as Typer takes it: each parameter that is a dataclass becomes its fields.

    The fields carry ``Annotated`` help text; ``body`` gets the objects.
    """
    parameters = _resolved(body)
    groups: dict[str, Any] = {
        p.name: p.annotation for p in parameters if is_dataclass(p.annotation)
    }

    @functools.wraps(body)
    def call(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in _resolved(kind)})
        body(**values)

    flat = [
        parameter.replace(kind=Parameter.KEYWORD_ONLY)  # an option with a default may come first
        for outer in parameters
        for parameter in (_resolved(groups[outer.name]) if outer.name in groups else [outer])
    ]
    call.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    return call


def _resolved(function: Callable[..., Any]) -> list[Parameter]:
    """Return the parameters with their annotations as objects rather than strings."""
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return [parameter.replace(annotation=hints[parameter.name]) for parameter in parameters]


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=lambda wanted: _print_version() if wanted else None,
            is_eager=True,
            help="Show the version.",
        ),
    ] = False,
) -> None:
    """Take the options that come before a command."""


def _print_version() -> None:
    from pomona import __version__

    typer.echo(f"pomona {__version__}")
    raise typer.Exit
