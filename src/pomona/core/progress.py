"""Progress reports of a stage at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Tick(NamedTuple):
    """How far a stage has come."""

    stage: str  # list, weights, spark, extract, table, reduce, train, report, …
    done: int = 0
    total: int = 0  # 0: unknown
    rejected: int = 0


OnTick = Callable[[Tick], None]


def quiet(_: Tick) -> None:
    """Ignore a tick."""


class Steps:
    """Count what a stage has done, as ticks from 0 to the total."""

    def __init__(self, on_tick: OnTick, stage: str, total: int) -> None:
        self.on_tick, self.stage, self.total, self.done = on_tick, stage, total, 0
        self(0)

    def __call__(self, more: int = 1) -> None:
        """Note that so many more steps are done."""
        self.done = min(self.done + more, self.total)
        self.on_tick(Tick(self.stage, self.done, self.total))
