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
