"""Decode photos that may end or stall the process: in a child that can be spared. Runs on workers.

Damaged bytes that a decoder notices are an error code (`pomona.photos.decoding`). Here are the ones
that it doesn't: a crash in native code, memory without end, a loop. On Spark a task is watched the
first time, and a stalled worker ends itself; when the task comes again, each photo is decoded in a
child process, and the photo that ends or stalls the child is known by that.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Literal

from pomona.core.schema import CRASHED
from pomona.photos.decoding import MAX_DECODED, Photo, decode

Guard = Literal["", "watch", "child"]

PATIENCE = 60.0
"""Seconds that decoding may take: a few photos of the largest size that is taken need five."""


START = 120.0
"""Seconds that the child may take to start, on a machine under load."""

READY = "ready"


def patience() -> float:
    """Return how long decoding may take, in seconds (``POMONA_DECODE_SECONDS``)."""
    return float(os.environ.get("POMONA_DECODE_SECONDS", PATIENCE))


@contextlib.contextmanager
def watched(seconds: float | None = None) -> Iterator[None]:
    """End the process, with a traceback on stderr, if the block takes longer than `patience`.

    The watch is a thread of its own in C: it works while native code holds the interpreter's lock.
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


def decode_apart(content: bytes | None, size: int, most: int = MAX_DECODED) -> Photo:
    """Decode a photo as `pomona.photos.decoding.decode` does, in a child process.

    Returns
    -------
    Photo
        With the error ``crashed`` if two children in turn died of it, or took longer than
        `patience`: one may die of something else, such as want of memory.
    """
    if not content:
        return decode(content, size, most)
    for _ in range(2):
        child = _child()
        try:
            child.pipe.send((content, size, most))
            if child.pipe.poll(patience()):
                return Photo(*child.pipe.recv())
        except (EOFError, OSError):  # it died
            pass
        child.end()
        del _own.child
    return Photo(None, None, None, CRASHED)


class _Child:
    """A process that decodes, started anew for this interpreter: nothing is inherited by fork."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        atexit.register(self.end)
        # Without this, a child that can't start would make every photo `crashed`.
        try:
            ready = self.pipe.poll(START) and self.pipe.recv() == READY
        except (EOFError, OSError):
            ready = False
        if not ready:
            self.end()
            raise RuntimeError("the process that decodes photos doesn't start")

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()
        atexit.unregister(self.end)


_own = threading.local()


def _child() -> _Child:
    """Return this thread's child: several threads of the service decode at a time."""
    if not hasattr(_own, "child"):
        _own.child = _Child()
    found: _Child = _own.child
    return found


def _serve(pipe: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):  # the parent has gone
        pipe.send(READY)
        while True:
            content, size, most = pipe.recv()
            # The parent ends a child that stalls, unless it was killed meanwhile.
            with watched(2 * patience()):
                photo = decode(content, size, most)
            pipe.send(tuple(photo))
