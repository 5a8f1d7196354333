"""A service on a free port of this machine, for tests."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from pomona.serving.server import address, listen, server


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """Run the application as ``pomona serve`` does, in a thread; gives its address."""
    with listen("127.0.0.1", 0) as opened:
        started = threading.Event()
        running_server = server(app, started.set)
        thread = threading.Thread(target=running_server.run, args=([opened],))
        thread.start()
        try:
            assert started.wait(30)
            yield address(opened)
        finally:
            running_server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def until(condition: Any, seconds: float = 60.0) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it didn't come to that"
        time.sleep(0.01)
