"""Around a command's work: OUT opened, a log in it, progress, and the outcome printed."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import typer

import pomona
from pomona.cli import render
from pomona.cli.progress import progress
from pomona.core.errors import BusyError, JobError, PomonaError, RequestError
from pomona.core.progress import OnTick
from pomona.core.uris import local_path
from pomona.workspace.layout import Out, open_out

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pomona.workspace.remote import Home


@contextlib.contextmanager
def working_in(out: str, source: str | None = None) -> Iterator[tuple[Home, OnTick]]:
    """Open OUT, wherever it is, with a log in it; a forget that was killed is ended first.

    Yields the folder to work in, and what takes the progress of stages there.
    """
    from pomona.workspace import remote

    with (
        progress() as on_tick,
        remote.opened(out, on_tick, source=source) as home,
        log_to(home.folder),
    ):
        if end_forget(home.folder, on_tick):
            home.after("forget")
        yield home, home.ticks(on_tick)


def end_forget(out: str, on_tick: OnTick, cluster: pomona.Cluster | None = None) -> bool:
    """End a forget that was killed: its rows, and with ``cluster`` what is made from the rest.

    Returns whether something may have changed.
    """
    from pomona.workspace import tombstones

    folder = Out(local_path(out))
    if not tombstones.pending_file(folder).exists() and not folder.journal.exists():
        return False
    from pomona.privacy import forget

    forget.finish(out, cluster, on_tick, rebuild=cluster is not None)
    return True


@contextlib.contextmanager
def log_to(out: str) -> Iterator[None]:
    """Keep a log in OUT; a bug leaves its traceback there and one line on the terminal."""
    existed = local_path(out).exists()
    folder = open_out(out)
    log = logging.getLogger("pomona")
    handler = logging.FileHandler(folder.log, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    except PomonaError as error:
        refused = isinstance(error, RequestError) and not isinstance(error, BusyError)
        if refused and not existed and not folder.table_file.exists():
            shutil.rmtree(folder.root, ignore_errors=True)  # a refused request leaves nothing
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise JobError(
                f"No space left on {folder.root}: free some, and run the same command again to "
                "go on; what is done is kept"
            ) from error
        log.exception("a bug")
        raise PomonaError(
            f"a bug in Pomona ({type(error).__name__}); the traceback is in {folder.log}"
        ) from error
    finally:
        log.removeHandler(handler)
        handler.close()


def show(
    record: Any, as_json: bool, to_text: Callable[[Any], render.Rows | RenderableType]
) -> None:
    """Print a record: as one line of JSON, or as ``to_text`` puts it."""
    if as_json:
        typer.echo(json.dumps(record, ensure_ascii=False, sort_keys=True))
        return
    from rich.console import Console

    terminal = sys.stdout.isatty()  # elsewhere nothing is folded: a path stays in one piece
    console = Console(width=None if terminal else 1000, emoji=False)
    console.print(render.stack(to_text(record)), markup=False, highlight=False)


def show_run(records: dict[str, Any], home: Home, as_json: bool) -> None:
    """Print what the stages of a run came to."""
    show(records, as_json, lambda records: render.summary(records, home))
