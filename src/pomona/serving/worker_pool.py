"""A bounded queue of photos, and one thread for each core that answers them.

The service submits photos and gets futures. A thread takes one photo at a time, on a GPU all that
wait. ONNX Runtime and Pillow release the interpreter's lock while they work, so that threads keep
all cores busy.
"""

from __future__ import annotations

import functools
import io
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from pomona.backbone.extract import extract_photos
from pomona.backbone.mobilenet import OUTPUT
from pomona.backbone.spec import BackboneSpec
from pomona.core.cpus import available_cpus
from pomona.model.artifact import Model
from pomona.model.recogniser import Recogniser, answer_photos, make_recogniser
from pomona.photos import synthetic
from pomona.photos.decoding import MAX_DECODED
from pomona.photos.isolation import Guard
from pomona.photos.synthetic_catalogue import LABELS

Kind = Literal["predict", "features"]
Row = dict[str, Any]

MOST_TOP = 20
"""Labels that an answer names at most."""

PER_WORKER = 16
"""Photos that may wait for each thread: the last one waits for 16 times a photo's time."""

STALLED = 10.0
"""Seconds that `Pool.stop` waits for its threads."""


class FullError(Exception):
    """The queue is full: the client should try again later."""


@dataclass(frozen=True)
class Loaded:
    """A model that answers. What it runs for answers and for features shares one session."""

    model: Model
    recogniser: Recogniser
    features: BackboneSpec

    def run(self, kind: Kind, contents: Sequence[bytes]) -> list[Row]:
        """Answer for photos' bytes: one row each.

        As `pomona.model.recogniser.ANSWERS`, or with ``features``, ``width`` and ``height``
        (pixels, as the file says) and ``error``.
        """
        if kind == "predict":
            return answer_photos(contents, self.recogniser)
        photos = extract_photos(contents, self.features)
        vectors = [None if row is None else row.tolist() for row in photos.by_photo(OUTPUT)]
        columns = (photos.widths, photos.heights, vectors, photos.errors)
        names = ("width", "height", "features", "error")
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def load(
    model: Model,
    *,
    device: str = "cpu",
    threads: int = 1,
    guard: Guard = "",
    pixels: int = MAX_DECODED,
) -> Loaded:
    """Build a model's session and send a photo through it; a RuntimeError if it gets no answer.

    ``threads`` decode for one GPU; without a GPU the pool's threads decode. ``guard`` and
    ``pixels`` are those of `BackboneSpec`.
    """
    recogniser = make_recogniser(model, MOST_TOP, device=device)
    decoders = threads if recogniser.spec.device == "cuda" else 1
    spec = replace(recogniser.spec, threads=decoders, guard=guard, pixels=pixels)
    loaded = Loaded(model, replace(recogniser, spec=spec), replace(spec, outputs=(OUTPUT,)))
    for kind in get_args(Kind):
        check(loaded.run(kind, [sample()])[0])
    return loaded


def check(row: Row) -> None:
    """Raise RuntimeError if the row for `sample` is no answer."""
    if row["error"] is not None:
        raise RuntimeError(f"a photo that is whole was refused: {row['error']}")


@functools.cache
def sample() -> bytes:
    """Return a photo to try a model with: a rendered fruit as JPEG."""
    file = io.BytesIO()
    synthetic.render(LABELS[0], 30).save(file, "JPEG", quality=90)
    return file.getvalue()


@dataclass
class _Job:
    kind: Kind
    content: bytes
    future: Future[tuple[Row, Loaded]]


class Pool:
    """The threads that answer, and their queue. ``loaded``: the model that answers now.

    There are ``workers`` threads, by default one for each core that the process may use, on a GPU
    one; ``limit`` photos may wait, by default `PER_WORKER` for each thread.
    """

    def __init__(
        self, loaded: Loaded, workers: int | None = None, limit: int | None = None
    ) -> None:
        spec = loaded.recogniser.spec
        on_gpu = spec.device == "cuda"
        self.workers = workers or (1 if on_gpu else available_cpus())
        self.limit = limit or PER_WORKER * self.workers
        self.at_once = spec.batch_size if on_gpu else 1
        self.loaded = loaded
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._work, name=f"pomona-{n}", daemon=True)
            for n in range(self.workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Photos that wait."""
        return len(self._jobs)

    @property
    def is_full(self) -> bool:
        """Whether the queue has no free place."""
        return len(self._jobs) >= self.limit

    def submit(
        self, kind: Kind, contents: Sequence[bytes], *, first: bool = False
    ) -> list[Future[tuple[Row, Loaded]]]:
        """Queue photos, all or none. A future that is cancelled before its turn is skipped.

        With ``first`` they go before all others and whatever the limit, for a check.

        Raises
        ------
        FullError
            If there isn't room for all.
        RuntimeError
            After `stop`.
        """
        jobs = [_Job(kind, content, Future()) for content in contents]
        with self._changed:
            if self._stopped:
                raise RuntimeError("the pool was stopped")
            if first:
                self._jobs.extendleft(reversed(jobs))
            else:
                if len(self._jobs) + len(jobs) > self.limit:
                    raise FullError
                self._jobs.extend(jobs)
            self._changed.notify(len(jobs))
        return [job.future for job in jobs]

    def drop_cancelled(self) -> None:
        """Remove photos whose futures were cancelled, so that their places and bytes are free."""
        with self._changed:
            self._jobs = deque(job for job in self._jobs if not job.future.cancelled())

    def stop(self) -> None:
        """Refuse further photos, answer those that wait, and end the threads.

        A thread that stalls is abandoned: it ends with the process.
        """
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        end = time.monotonic() + STALLED
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    # --- in the threads ---

    def _work(self) -> None:
        while jobs := self._take():
            loaded = self.loaded
            try:
                rows = loaded.run(jobs[0].kind, [job.content for job in jobs])
                pairs = list(zip(jobs, rows, strict=True))
            except Exception as error:  # noqa: BLE001 - the request gets it, and the thread goes on
                for job in jobs:
                    job.future.set_exception(error)
                continue
            for job, row in pairs:
                job.future.set_result((row, loaded))

    def _take(self) -> list[_Job]:
        """Wait for photos; return one, on a GPU all waiting ones of a kind; none after `stop`."""
        with self._changed:
            while True:
                jobs: list[_Job] = []
                while self._jobs and len(jobs) < self.at_once:
                    if jobs and self._jobs[0].kind != jobs[0].kind:
                        break
                    job = self._jobs.popleft()
                    if job.future.set_running_or_notify_cancel():
                        jobs.append(job)
                if jobs or self._stopped:
                    return jobs
                self._changed.wait()
