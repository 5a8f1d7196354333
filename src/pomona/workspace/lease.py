"""One writer at a time at a place: a lock file that its holder refreshes."""

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
"""Seconds between refreshes of the lock file."""

SILENT = 60.0
"""Seconds without a refresh, by the watcher's clock, after which the holder counts as dead."""

ANCIENT = 600.0
"""Seconds after which a lock is taken over without watching: clocks don't differ by that much."""

SETTLE = 1.0
"""Seconds between writing the lock and reading it again: two may have written at the same time."""

LAST_SECONDS = 20.0
"""Seconds for uploads after a failure or an interrupt: a stopped container has 30 s to end."""


class Lease:
    """A lock at a place; another process may take it over after `SILENT` seconds without refresh.

    Once that has happened, ``lost`` is the error to raise.
    """

    def __init__(self, place: Place, on_tick: OnTick = quiet) -> None:
        self.place, self.on_tick = place, on_tick
        self.me = {"id": uuid.uuid4().hex, "pid": os.getpid(), **_machine()}
        self.since = utc_now()
        self.lost: BusyError | None = None

    def acquire(self) -> None:
        """Take the lock, from a dead holder if need be. Raises BusyError if the holder lives."""
        holder = self.place.read_json(LOCK)
        if holder and not self._is_dead(holder):
            started = time.monotonic()
            log.info("%s is locked by %s: watching for refreshes", self.place, holder.get("host"))
            while (waited := time.monotonic() - started) < SILENT:
                self.on_tick(Tick("lock", int(waited), int(SILENT)))
                time.sleep(min(2.0, SILENT / 10))
                now = self.place.read_json(LOCK)
                if not now:
                    break
                if now != holder:
                    raise _busy(self.place, now)
        self._write()
        time.sleep(SETTLE)
        self.check()

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        if time.time() - float(holder.get("refreshed", 0)) > ANCIENT:
            return True
        same_machine = all(holder.get(name) == value for name, value in _machine().items())
        return same_machine and not _is_alive(int(holder.get("pid", 0)))

    def refresh(self) -> None:
        """Show that this process is alive. Raises BusyError if another has taken over."""
        self.check()
        self._write()

    def check(self) -> None:
        """Raise BusyError if another process holds the lock."""
        holder = self.place.read_json(LOCK)
        if holder and holder.get("id") != self.me["id"]:
            self.lost = _busy(self.place, holder)
            raise self.lost

    def _write(self) -> None:
        self.place.write_json(LOCK, {**self.me, "since": self.since, "refreshed": time.time()})

    def release(self) -> None:
        """Remove the lock file, unless another process has taken over."""
        with contextlib.suppress(BusyError):
            self.check()
            self.place.delete(LOCK)


def is_leased(place: Place) -> bool:
    """Tell whether somebody seems to be at work there, by the time of the last refresh.

    Raises RequestError if the store doesn't answer.
    """
    with refusing(place, "read"):
        holder = place.read_json(LOCK)
    return bool(holder) and time.time() - float(holder.get("refreshed", 0)) < SILENT


def _busy(place: Place, holder: dict[str, Any]) -> BusyError:
    return BusyError(
        f"another pomona run is at work on {place} ({holder.get('host')}, process "
        f"{holder.get('pid')}, since {holder.get('since')}): wait for it, or choose another place"
    )


def _machine() -> dict[str, str]:
    """Return what identifies this machine and PID namespace, so that a PID can be compared.

    Hosts may share a name, and outside containers also the number of their PID namespace.
    """
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pid_namespace = str(Path("/proc/self/ns/pid").readlink())
        return {"host": platform.node(), "boot": boot, "space": pid_namespace}
    return {"host": platform.node(), "card": f"{uuid.getnode():x}"}


def _is_alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # there, os.kill would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # there is one, of another user
        pass
    return True


@contextlib.contextmanager
def leased(place: Place, on_tick: OnTick = quiet) -> Iterator[Lease]:
    """Hold the lock of a place, refreshed by a thread.

    Raises BusyError if another process is at work there, RequestError if it can't be written.
    """
    lease = Lease(place, on_tick)
    with refusing(place, "locked"):
        lease.acquire()
    try:
        with every(REFRESH, lease.refresh, "refresh of the lock"):
            yield lease
    finally:
        with contextlib.suppress(OSError):
            lease.release()


@contextlib.contextmanager
def every(seconds: float, call: Callable[[], object], what: str) -> Iterator[None]:
    """Call every so many seconds in a thread. A call that fails is logged, and made again later."""
    ended = threading.Event()

    def loop() -> None:
        pause = seconds
        while not ended.wait(pause):
            started = time.monotonic()
            try:
                call()
            except (OSError, PomonaError) as error:
                log.warning("%s: %s", what, first_line(error))
            # A slow call is made less often.
            pause = max(seconds, 5 * (time.monotonic() - started))

    thread = threading.Thread(target=loop, name=what, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=LAST_SECONDS)
