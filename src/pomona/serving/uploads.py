"""Read photos from a request's body: within limits, in memory, never on disk."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from email.message import Message

import anyio
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from pomona.core.schema import TOO_LARGE
from pomona.serving.problem_details import Problem, of_photo

RAW = "application/octet-stream"
MULTIPART = "multipart/form-data"
PER_PART = 1024
"""Bytes that a part's boundary and headers may add to its photo."""


@dataclass(frozen=True)
class Limits:
    """Limits of one request."""

    body: int = 20 << 20  # bytes
    photos: int = 16
    seconds: float = 60.0  # that a body may take to arrive
    stall: float = 10.0  # seconds that may pass without a byte of it

    @property
    def whole(self) -> int:
        """Bytes of a body with all that a form adds to its photos."""
        return self.body + self.photos * PER_PART


SMALL = 1 << 20
"""Bytes of a body that may use the last quarter of a `Budget`."""


class Budget:
    """Bytes that all bodies together may take, so that memory stays bounded.

    A quarter is reserved for bodies up to `SMALL`: a few large ones don't keep all others out.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    @contextlib.contextmanager
    def share(self) -> Iterator[Share]:
        """Give a request its share, and take it back afterwards."""
        share = Share(self)
        try:
            yield share
        finally:
            self.used -= share.used


class Share:
    """What one request holds of the budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.used = budget, 0

    def take(self, count: int) -> None:
        """Take ``count`` more bytes, or raise the problem ``overloaded``."""
        limit = self.budget.limit
        if self.used + count > SMALL:
            limit = limit * 3 // 4
        if self.budget.used + count > limit:
            raise overloaded()
        self.budget.used += count
        self.used += count


def overloaded() -> Problem:
    """Return the problem of a request that there is no room for."""
    detail = "The server is busy: send the request again after the seconds in Retry-After."
    return Problem(503, "overloaded", detail, {"Retry-After": "1"})


class _InMemory(MultiPartParser):
    """A parser that keeps files in memory: Starlette's own spools those above 1 MB to disk."""

    spool_max_size = 1 << 62
    ended = False

    def on_headers_finished(self) -> None:
        """Take a part whose file name is only given as ``filename*`` (RFC 5987) for a file, too.

        RFC 7578 forbids it in forms, and so the library ignores it; clients send it.
        """
        header, part = Message(), self._current_part
        header["content-disposition"] = (part.content_disposition or b"").decode("latin-1")
        if header.get_filename() is not None:
            part.content_disposition = (part.content_disposition or b"") + b'; filename="photo"'
        super().on_headers_finished()

    def on_end(self) -> None:
        self.ended = True


async def photos(request: Request, limits: Limits, share: Share) -> list[bytes]:
    """Read a request's photos: a raw body is one, each file of a form is one.

    Raises
    ------
    Problem
        If there are none or too many, or they are too large, too slow, or of another kind.
    starlette.requests.ClientDisconnect
        If the client has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise Problem(415, "unsupported_encoding", "Send the photo without Content-Encoding.")
    if not (kind.startswith("image/") or kind in (RAW, MULTIPART)):
        raise Problem(
            415,
            "unsupported_media_type",
            f"Send a photo as the body with its type (Content-Type: image/jpeg, or {RAW}), or "
            f"photos as files of a form ({MULTIPART}).",
        )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.whole:  # before it is read
        raise _too_large(limits)
    try:
        with anyio.fail_after(min(limits.stall, limits.seconds)) as patience:
            chunks = _chunks(request, limits, share, patience)
            if kind == MULTIPART:
                return await _form(request, limits, chunks)
            return [b"".join([chunk async for chunk in chunks])]
    except TimeoutError:
        raise Problem(
            408,
            "timeout",
            f"The photo took longer than {limits.seconds:g} seconds to arrive, or nothing came for "
            f"{limits.stall:g}: send it again, or a smaller one.",
            {"Connection": "close"},
        ) from None


def _too_large(limits: Limits) -> Problem:
    problem = of_photo(TOO_LARGE)
    problem.detail = f"A request holds {limits.body / 1e6:.0f} MB at most: send a smaller photo."
    return problem


async def _chunks(
    request: Request, limits: Limits, share: Share, patience: anyio.CancelScope
) -> AsyncGenerator[bytes, None]:
    end = anyio.current_time() + limits.seconds
    async for chunk in request.stream():
        if share.used + len(chunk) > limits.whole:
            raise _too_large(limits)
        share.take(len(chunk))
        patience.deadline = min(end, anyio.current_time() + limits.stall)
        yield chunk


async def _form(
    request: Request, limits: Limits, chunks: AsyncGenerator[bytes, None]
) -> list[bytes]:
    async def complete() -> AsyncGenerator[bytes, None]:
        async for chunk in chunks:
            yield chunk
        if not parser.ended:  # raised in here, so that the parser closes its files
            raise MultiPartException("it ends too early")

    parser = _InMemory(
        request.headers,
        complete(),
        max_files=limits.photos,
        max_fields=limits.photos,
        max_part_size=PER_PART,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many"):
            detail = f"A request holds {limits.photos} photos at most."
            raise Problem(413, "too_many_photos", detail) from None
        raise Problem(400, "malformed", f"The form can't be read: {error.message}") from None
    except ValueError:  # by Starlette, for a charset with a null in its name
        detail = "The form's charset isn't known: leave it out of Content-Type."
        raise Problem(400, "malformed", detail) from None
    try:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        contents = [await file.read() for file in files]
    finally:
        await form.close()
    if not contents:
        raise Problem(400, "no_photo", "The form holds no file: send at least one photo.")
    return contents
