"""The groups of commands, and dataclasses as options."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from pomona.cli import options
from pomona.cli.commands.make_model import FinetuneArguments
from pomona.cli.commands.operate import ExportArguments
from pomona.cli.main import app
from pomona.cli.options import GROUPS, GroupedCommands, with_options


def test_each_command_is_in_a_group_with_one_whole_line() -> None:
    root = get_command(app)
    assert isinstance(root, GroupedCommands)
    assert sorted(name for names in root.by_group().values() for name in names) == sorted(
        root.commands
    )
    lines = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["--help"]).output.splitlines()
    assert [line[:-1] for line in lines if line[:-1] in GROUPS] == list(GROUPS)
    for name in root.commands:
        (line,) = (line for line in lines if line.startswith(f"  {name} "))
        assert line.endswith((".", ":")) and not line.endswith("..."), line
        assert len(line) <= 80


def test_defaults_are_those_of_python() -> None:
    from pomona.export.export import ExportOptions
    from pomona.pipeline.extract import ExtractOptions
    from pomona.pipeline.finetune import FinetuneOptions
    from pomona.pipeline.reduce import ReduceOptions
    from pomona.pipeline.train import TrainOptions

    assert options.ExtractArguments().options() == ExtractOptions()
    assert options.ReduceArguments().options(plots=True) == ReduceOptions()
    assert TrainOptions(**asdict(options.TrainArguments())) == TrainOptions()
    assert FinetuneOptions(**asdict(FinetuneArguments())) == FinetuneOptions()
    assert ExportOptions(**asdict(ExportArguments())) == ExportOptions()


@dataclass(frozen=True)
class Size:
    width_mm: Annotated[int, "How wide."]
    deep: Annotated[bool, "Deep, too."] = False
    colour: Annotated[str, typer.Option("--color", help="Which.")] = "red"


@pytest.fixture
def call() -> Any:
    """Call a command that takes a `Size`; returns (exit code, output, what the body got)."""
    calls: list[Any] = []

    def body(name: Annotated[str, typer.Argument()], size: Size, often: int = 1) -> None:
        calls.append((name, size, often))

    small = typer.Typer(rich_markup_mode=None)
    small.command()(with_options(body))

    def run(*words: str) -> tuple[int, str, Any]:
        ended = CliRunner().invoke(small, words)
        return ended.exit_code, ended.output, calls[-1] if calls else None

    return run


def test_fields_become_options_and_the_body_gets_objects(call: Any) -> None:
    assert call("box", "--width-mm", "3")[2] == ("box", Size(3), 1)
    words = ("box", "--width-mm", "3", "--deep", "--color", "blue", "--often", "2")
    assert call(*words)[2] == ("box", Size(3, True, "blue"), 2)
    assert call("box")[0] == 2  # a field without a default is required
    assert call("box", "--width-mm", "3", "--no-deep")[0] == 2
    assert "How wide." in call("--help")[1]
