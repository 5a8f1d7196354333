"""Around a command's work: OUT opened, a log in it, progress on stderr, the outcome printed."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any

import typer

import pomona
from pomona.cli import render
from pomona.core.errors import BusyError, JobError, PomonaError, RequestError
from pomona.core.printable import LogFormatter, escaped, json_line
from pomona.core.progress import OnTick, Tick
from pomona.core.uris import local_path
from pomona.workspace.layout import Out, open_out

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

    from pomona.workspace.remote import Home

WORDS = {
    "list": "listing photos",
    "weights": "fetching weights (bytes)",
    "start": "starting workers",
    "verify": "comparing digests",
    "extract": "extracting features",
    "table": "writing the table",
    "reduce": "reducing",
    "train": "training",
    "report": "writing the report",
    "predict": "answering",
    "decode": "decoding photos",
    "finetune": "training (photos)",
    "export": "exporting",
    "publish": "publishing",
    "forget": "forgetting",
    "synthesize": "rendering",
    "push": "pushing (bytes)",
    "pull": "pulling (bytes)",
    "lock": "waiting whether another run is alive (seconds)",
    "inspect": "looking at photos",
}
TIMED = ("extract", "synthesize", "inspect", "predict", "decode", "finetune")
"""Stages whose speed and time left are shown."""
LINE_EVERY = 5.0  # seconds between lines where there is no terminal


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
    """Finish a forget that was killed; with ``cluster``, rebuild too. Returns if there was one."""
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
    handler.setFormatter(LogFormatter())
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


def show(record: Any, as_json: bool, draw: Callable[[Any], render.Rows | RenderableType]) -> None:
    """Print a record: as one line of JSON, or as ``draw`` shows it to people."""
    if as_json:
        typer.echo(json_line(record))
    else:
        write(sys.stdout, draw(record))


def write(stream: IO[str], text: render.Rows | RenderableType) -> None:
    """Print to a stream; nothing is folded off a terminal, so that a path stays in one piece."""
    from rich.console import Console

    console = Console(file=stream, width=None if stream.isatty() else 1000, emoji=False)
    text = escaped(text) if isinstance(text, str) else text
    console.print(render.stack(text), markup=False, highlight=False)


def show_run(records: dict[str, Any], home: Home, as_json: bool) -> None:
    """Print what the stages of a run came to."""
    show(records, as_json, lambda records: render.summary(records, home))


def counter(on_tick: OnTick, stage: str) -> Callable[[int, int], None]:
    """Return a function of (done, total) that passes them on as a stage's progress."""
    return lambda done, total: on_tick(Tick(stage, done, total))


@contextlib.contextmanager
def progress() -> Iterator[OnTick]:
    """Give a function that shows ticks on stderr: as a bar on a terminal, elsewhere as lines."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    if not sys.stderr.isatty():
        # In a notebook, rich would show each line as HTML; plain text was asked for.
        console = Console(file=sys.stderr, force_jupyter=False)
        yield _lines(Progress(console=console, speed_estimate_period=60))
        return
    # While Spark starts, the process's own stderr goes to the log: the bar needs a copy of it.
    console = Console(file=os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding="utf-8"))
    words, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    columns = (SpinnerColumn(), words, BarColumn(), MofNCompleteColumn(), note)
    with Progress(*columns, console=console, transient=True, speed_estimate_period=60) as bars:
        yield lambda tick: _update(bars, tick)


def _update(bars: Progress, tick: Tick) -> None:
    """Bring the bar of a tick's stage up to date; the others are hidden."""
    words = WORDS[tick.stage]
    if not bars.tasks or bars.tasks[-1].description != words:
        for task in bars.tasks:
            bars.update(task.id, visible=False)
        bars.add_task(words, total=None, note="")
    task = bars.tasks[-1]
    bars.update(task.id, completed=tick.done, total=tick.total or None)
    bars.update(task.id, note=describe(tick, task))


def describe(tick: Tick, task: Any) -> str:
    """Return the numbers of a tick and rich's task as words: speed, time left, rejected.

    >>> from types import SimpleNamespace as Task
    >>> describe(Tick("extract", 300, 900, rejected=2), Task(speed=100.0, time_remaining=6))
    '100/s, 0:06 left, 2 rejected'
    """
    words = []
    if task.speed and tick.stage in TIMED:
        minutes, seconds = divmod(int(task.time_remaining or 0), 60)
        hours, minutes = divmod(minutes, 60)
        left = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        words += [f"{task.speed:.0f}/s", f"{left} left"]
    if tick.rejected:
        words.append(f"{tick.rejected:,} rejected")
    return ", ".join(words)


def _lines(bars: Progress) -> OnTick:
    """Return a function that prints a line when a stage begins or ends, and now and then."""
    last, shown_at = Tick(""), 0.0

    def on_tick(tick: Tick) -> None:
        nonlocal last, shown_at
        _update(bars, tick)
        now = time.monotonic()
        over = bool(tick.total) and tick.done == tick.total and last.done != tick.done
        if tick.stage == last.stage and now - shown_at < LINE_EVERY and not over:
            return
        last, shown_at = tick, now
        count = f" {tick.done:,}" if tick.done or tick.total else ""
        count += f" of {tick.total:,}" if tick.total else ""
        note = f", {words}" if (words := bars.tasks[-1].fields["note"]) else ""
        bars.console.print(f"{WORDS[tick.stage]}:{count}{note}", markup=False, highlight=False)

    return on_tick
