"""What a person sees while a command works: a bar on a terminal, elsewhere lines; on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pomona.core.progress import OnTick, Tick

if TYPE_CHECKING:
    from rich.progress import Progress

WORDS = {
    "list": "listing photos",
    "weights": "fetching weights (bytes)",
    "spark": "starting Spark",
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
LINE_EVERY = 5.0
"""Seconds between lines where there is no terminal."""


def counter(on_tick: OnTick, stage: str) -> Callable[[int, int], None]:
    """Return a function of (done, total) that passes them on as a stage's progress."""
    return lambda done, total: on_tick(Tick(stage, done, total))


@contextlib.contextmanager
def progress() -> Iterator[OnTick]:
    """Give a function that shows ticks on stderr."""
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
        line = f"{WORDS[tick.stage]}:{count}"
        words = ", ".join(filter(None, (line, bars.tasks[-1].fields["note"])))
        bars.console.print(words, markup=False, highlight=False)

    return on_tick
