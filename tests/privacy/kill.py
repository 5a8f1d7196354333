"""Start a forget of the same photos in several OUTs, and kill each at a point of its own.

``python kill.py '[["move:1", "OUT"], …]' PHOTO …`` prints the exit codes, 9 for each that was
killed. A point is what is about to happen, and for how many times: ``move`` and ``remove`` a file,
clean ``copies``, ``stage`` the tables, ``rebuild``. The children are forks of one process, so that
Pomona is imported once. Nothing is cleaned up in them, as after a real kill.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from pomona.privacy import copies, erase, forget, staging

POINTS: dict[str, tuple[Any, str]] = {
    "move": (Path, "rename"),
    "remove": (Path, "unlink"),
    "copies": (copies, "clean"),
    "stage": (staging, "stage"),
    "rebuild": (erase, "rebuild_derived"),
}


def arm(point: str) -> None:
    """Let the process die when a function is called for so many times."""
    kind, number = point.split(":")
    owner, name = POINTS[kind]
    real, calls = getattr(owner, name), itertools.count(1)

    def counted(*words: Any, **options: Any) -> Any:
        if next(calls) == int(number):
            os._exit(9)
        return real(*words, **options)

    setattr(owner, name, counted)


def child(point: str, out: str, photos: list[str]) -> int:
    """Fork a process that forgets the photos; returns its id."""
    if process := os.fork():
        return process
    try:
        arm(point)
        forget.forget(out, photos, forget.ForgetOptions(rebuild=False))
        os._exit(0)
    except BaseException:  # noqa: BLE001 - whatever it is, this process must not go on
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    processes = [child(point, out, sys.argv[2:]) for point, out in json.loads(sys.argv[1])]
    print([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes])
