"""One writer at a time on an object store: a lock with signs of life."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pomona.core.errors import BusyError, PomonaError, first_line
from pomona.core.progress import OnTick, Tick, quiet
from pomona.core.provenance import utc_now
from pomona.workspace.remote_folder import Place, refusing

log = logging.getLogger("pomona")


LOCK = "_lock.json"

REFRESH = 10.0
"""Seconds between a writer's signs of life."""

SILENT = 60.0
"""A lock that doesn't change for so many seconds, by the watcher's clock, is a dead writer's."""

ANCIENT = 600.0
"""A lock this old is taken over without watching: clocks don't differ by ten minutes."""

SETTLE = 1.0

LAST_SECONDS = 20.0
"""After a failure or an interrupt no upload starts later than this: containers are given 30 s."""


# --- one writer --------------------------------------------------------------------------------


class Lease:
    """A lock at a place. Given up by `release`, or lost to another after a long silence."""

    def __init__(self, place: Place, on_tick: OnTick = quiet) -> None:
        self.place, self.on_tick = place, on_tick
        self.me = {"id": uuid.uuid4().hex, "pid": os.getpid(), **_whereabouts()}
        self.since = utc_now()
        self.lost: BusyError | None = None

    def acquire(self) -> None:
        """Take the lock, from a dead writer if need be.

        Raises
        ------
        BusyError
            If another is at work there.
        """
        there = self.place.read_json(LOCK)
        if there and not self._is_dead(there):
            started = time.monotonic()
            log.info("%s is locked by %s: watching whether it lives", self.place, there.get("host"))
            while (waited := time.monotonic() - started) < SILENT:
                self.on_tick(Tick("lock", int(waited), int(SILENT)))
                time.sleep(min(2.0, SILENT / 10))
                now = self.place.read_json(LOCK)
                if not now:
                    break
                if now != there:
                    raise _busy(self.place, now)
        self._write()
        time.sleep(SETTLE)
        self.check()

    def _is_dead(self, there: dict[str, Any]) -> bool:
        if time.time() - float(there.get("refreshed", 0)) > ANCIENT:
            return True
        here = _whereabouts()
        same = all(there.get(name) == value for name, value in here.items())
        return same and not _is_alive(int(there.get("pid", 0)))

    def refresh(self) -> None:
        """Give a sign of life, unless another has taken over."""
        self.check()
        self._write()

    def check(self) -> None:
        """Raise BusyError if the lock is another's."""
        there = self.place.read_json(LOCK)
        if there and there.get("id") != self.me["id"]:
            self.lost = _busy(self.place, there)
            raise self.lost

    def _write(self) -> None:
        about = {**self.me, "since": self.since, "refreshed": time.time()}
        self.place.write_json(LOCK, about)

    def release(self) -> None:
        """Let go."""
        with contextlib.suppress(BusyError):
            self.check()
            self.place.delete(LOCK)


def is_leased(place: Place) -> bool:
    """Tell whether somebody seems to be at work there: one look, by the clock."""
    there = place.read_json(LOCK)
    return bool(there) and time.time() - float(there.get("refreshed", 0)) < SILENT


def _busy(place: Place, there: dict[str, Any]) -> BusyError:
    return BusyError(
        f"another pomona run is at work on {place} ({there.get('host')}, process "
        f"{there.get('pid')}, since {there.get('since')}): wait for it, or choose another place"
    )


def _whereabouts() -> dict[str, str]:
    """Return what must be the same for a process number to mean the same process.

    Hosts may share a name, and outside containers the number of their process space, too.
    """
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = str(Path("/proc/self/ns/pid").readlink())
        return {"host": platform.node(), "boot": boot, "space": space}
    return {"host": platform.node(), "card": f"{uuid.getnode():x}"}


def _is_alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # a signal there would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def leased(place: Place, on_tick: OnTick = quiet) -> Iterator[Lease]:
    """Hold a place, with signs of life from a thread."""
    lease = Lease(place, on_tick)
    with refusing(place, "locked"):
        lease.acquire()
    try:
        with every(REFRESH, lease.refresh, "sign of life"):
            yield lease
    finally:
        with contextlib.suppress(OSError):
            lease.release()


@contextlib.contextmanager
def every(seconds: float, call: Callable[[], object], what: str) -> Iterator[None]:
    """Call again and again in a thread. What fails is logged, and done the next time."""
    ended = threading.Event()

    def loop() -> None:
        pause = seconds
        while not ended.wait(pause):
            started = time.monotonic()
            try:
                call()
            except (OSError, PomonaError) as error:
                log.warning("%s: %s", what, first_line(error))
            # What takes long is done less often.
            pause = max(seconds, 5 * (time.monotonic() - started))

    thread = threading.Thread(target=loop, name=what, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=LAST_SECONDS)
