"""Isolation: decode photos that may crash or stall the process in a child process.

Runs on workers.

What a photo claims is checked before it is decoded (`pomona.photos.decoding_cost`), and damage that
a decoder notices becomes an error code (`pomona.photos.decoding`). This module is for what neither
notices: a crash in native code, unbounded memory, an endless loop. A task's first attempt is
watched, and a stalled worker ends itself; in the second attempt each photo is decoded in a child
process, so that the photo that crashes or stalls it is known. Where there is no second attempt (the
driver, a few photos of `pomona predict`, costly ones in the service) the child comes first.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any, Literal

from PIL import ImageFile

from pomona.core.schema import CRASHED
from pomona.photos.decoding import MAX_DECODED, Photo, decode

Guard = Literal["", "watch", "child"]

PATIENCE = 60.0
"""Seconds that decoding may take: a few photos of the largest accepted size need five."""

START = 120.0
"""Seconds that the child process may take to start, on a loaded machine."""

READY = "ready"


def patience() -> float:
    """Return the seconds that decoding may take (``POMONA_DECODE_SECONDS``)."""
    return float(os.environ.get("POMONA_DECODE_SECONDS", PATIENCE))


@contextlib.contextmanager
def watched(seconds: float | None = None) -> Iterator[None]:
    """End the process, with a traceback on stderr, if the block takes longer than `patience`.

    faulthandler's timer is a thread in C: it also works while native code holds Python's GIL.
    """
    stderr = sys.__stderr__
    if stderr is None:
        yield
        return
    faulthandler.dump_traceback_later(seconds or patience(), exit=True, file=stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def decode_apart(
    content: bytes | None,
    size: int,
    most: int = MAX_DECODED,
    seconds: float | None = None,
    *,
    partial: bool = False,
) -> Photo:
    """Decode a photo as `pomona.photos.decoding.decode` does, in a child process.

    Its error is ``crashed`` if two children in turn died or took longer than `patience`. One alone
    may have died of something else, such as a lack of memory. With ``seconds`` the photo has no
    longer than that in all, and a child that stalls isn't followed by another. With ``partial`` a
    damaged photo gives as much of it as can be decoded.
    """
    if not content:
        return decode(content, size, most)
    end = time.monotonic() + (2 * patience() if seconds is None else seconds)
    for _ in range(2):
        child = _child()
        child.wait()
        try:
            child.pipe.send((content, size, most, partial))
            if child.pipe.poll(patience() if seconds is None else end - time.monotonic()):
                return Photo(*child.pipe.recv())
        except (EOFError, OSError):  # it died
            pass
        child.end()
        del _own.child
        if time.monotonic() > end:
            break
    return Photo(None, None, None, CRASHED)


class _Child:
    """A process that decodes.

    It isn't forked, so that it inherits no locks or threads; and it is none of multiprocessing's,
    which would run a script that called Pomona again, unless that has a main guard.
    """

    def __init__(self) -> None:
        from loky.backend import get_context

        self.pipe, theirs = Pipe()
        self.process = get_context("loky").Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        # It ends with the thread that has it, and with this process.
        self.end = weakref.finalize(self, _end, self.process, self.pipe)
        self._ready = False

    def wait(self) -> None:
        """Return when it has started. Otherwise every photo would be `crashed` if none can."""
        if self._ready:
            return
        try:
            ready = self.pipe.poll(START) and self.pipe.recv() == READY
        except (EOFError, OSError):
            ready = False
        if not ready:
            self.end()
            raise RuntimeError("the process that decodes photos doesn't start")
        self._ready = True


def start() -> None:
    """Start this thread's child, without waiting for it: it takes half a second."""
    _child()


def _end(process: Any, pipe: Connection) -> None:
    from loky.backend.utils import kill_process_tree

    kill_process_tree(process)
    process.join()
    pipe.close()


_own = threading.local()


def _child() -> _Child:
    """Return this thread's child, as several threads of the service decode at a time."""
    if not hasattr(_own, "child"):
        _own.child = _Child()
    child: _Child = _own.child
    return child


def _serve(pipe: Connection) -> None:
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):  # the parent goes
        pipe.send(READY)
        while True:
            content, size, most, ImageFile.LOAD_TRUNCATED_IMAGES = pipe.recv()
            # The parent ends a stalled child, unless the parent itself was killed meanwhile.
            with watched(2 * patience()):
                photo = decode(content, size, most)
            pipe.send(tuple(photo))
