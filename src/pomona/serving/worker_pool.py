"""A bounded queue of photos, and one thread for each core that answers them.

The service submits photos and gets futures. A thread takes one photo at a time, on a GPU all that
wait. ONNX Runtime and Pillow release the interpreter's lock while they work, so that threads keep
all cores busy. A photo that is costly by its headers waits until fewer than half of the threads
have one, and is decoded in a child process that has `DECODE_SECONDS`: ordinary photos go past it.
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
from pomona.engine.engine import in_child
from pomona.model.artifact import Model
from pomona.model.recogniser import Recogniser, answer_photos, make_recogniser
from pomona.photos import synthetic
from pomona.photos.decoding import MAX_DECODED, estimate
from pomona.photos.isolation import Guard, patience
from pomona.photos.synthetic_catalogue import LABELS

Kind = Literal["predict", "features"]
Row = dict[str, Any]

MOST_TOP = 20
"""Labels that an answer names at most."""

PER_WORKER = 16
"""Photos that may wait for each thread: the last one waits for 16 times a photo's time."""

COSTLY = 0.5
"""Seconds of decoding, by estimate, from which a photo is costly: a PNG of 10 megapixels."""

DECODE_SECONDS = 4.0
"""Seconds that a child process may decode one photo: more than an estimate that is accepted by
default, less than `/readyz` waits."""

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

    def apart(self) -> Loaded:
        """Return the same model, decoding in a child process."""
        recogniser = replace(self.recogniser, spec=in_child(self.recogniser.spec))
        return replace(self, recogniser=recogniser, features=in_child(self.features))

    def seconds(self, content: bytes) -> float:
        """Return how long a photo takes to decode, by its headers."""
        spec = self.recogniser.spec
        return estimate(content, spec.image_size, spec.pixels).seconds


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
    spec = replace(
        recogniser.spec,
        threads=decoders,
        guard=guard,
        pixels=pixels,
        seconds=min(DECODE_SECONDS, patience()),
    )
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
    is_costly: bool | None = None  # None: nobody has looked


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
        self._costly: deque[_Job] = deque()  # that wait until one of their kind has ended
        self._running_costly, self._most_costly = 0, max(1, self.workers // 2)
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
        return len(self._jobs) + len(self._costly)

    @property
    def is_full(self) -> bool:
        """Whether the queue has no free place."""
        return self.waiting >= self.limit

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
                if self.waiting + len(jobs) > self.limit:
                    raise FullError
                self._jobs.extend(jobs)
            self._changed.notify(len(jobs))
        return [job.future for job in jobs]

    def drop_cancelled(self) -> None:
        """Remove photos whose futures were cancelled, so that their places and bytes are free."""
        with self._changed:
            self._jobs = deque(job for job in self._jobs if not job.future.cancelled())
            self._costly = deque(job for job in self._costly if not job.future.cancelled())

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
            if jobs[0].is_costly:
                try:
                    self._answer(jobs, self.loaded, self.loaded.apart())
                finally:
                    with self._changed:
                        self._running_costly -= 1
                        self._changed.notify_all()
            elif ordinary := [job for job in jobs if not self._set_aside(job)]:
                self._answer(ordinary, self.loaded, self.loaded)

    def _answer(self, waiting: list[_Job], loaded: Loaded, runner: Loaded) -> None:
        jobs = [job for job in waiting if job.future.set_running_or_notify_cancel()]
        if not jobs:
            return
        try:
            rows = runner.run(jobs[0].kind, [job.content for job in jobs])
            pairs = list(zip(jobs, rows, strict=True))
        except Exception as error:  # noqa: BLE001 - the request gets it, and the thread goes on
            for job in jobs:
                job.future.set_exception(error)
            return
        for job, row in pairs:
            job.future.set_result((row, loaded))

    def _set_aside(self, job: _Job) -> bool:
        """Look at a photo's headers; a costly one goes into a queue of its own."""
        job.is_costly = self.loaded.seconds(job.content) > COSTLY
        if job.is_costly:
            with self._changed:
                self._costly.append(job)
                self._changed.notify()
        return job.is_costly

    def _take(self) -> list[_Job]:
        """Wait for photos; return a costly one if it may run, else one, on a GPU all of a kind.

        Returns none after `stop`.
        """
        with self._changed:
            while True:
                if self._costly and self._running_costly < self._most_costly:
                    self._running_costly += 1
                    return [self._costly.popleft()]
                jobs: list[_Job] = []
                while self._jobs and len(jobs) < self.at_once:
                    if jobs and self._jobs[0].kind != jobs[0].kind:
                        break
                    jobs.append(self._jobs.popleft())
                if jobs or (self._stopped and not self._costly):
                    return jobs
                self._changed.wait()
