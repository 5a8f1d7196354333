"""Every error that Pomona raises on purpose.

A photo that can't be used is not an exception: it is a row with a code from `pomona.core.schema`.
"""

from __future__ import annotations


class PomonaError(Exception):
    """Base of all errors that are raised on purpose. ``str(error)`` is one line for the user."""

    exit_code = 1  # of the command


class RequestError(PomonaError):
    """The request is wrong; the message says what to do instead."""

    exit_code = 2


class SourceError(RequestError):
    """The source is missing, holds no photos, or can't be listed."""


class WeightsError(RequestError):
    """The weights are missing, damaged, or not MobileNetV2's."""


class MismatchError(RequestError):
    """OUT was made with other settings than the ones asked for."""


class DamagedError(MismatchError):
    """A file is not as Pomona wrote it.

    ``files`` names those that `pomona.core.parquet.gather` can't read, as they were given to it.
    """

    def __init__(self, message: str, *files: str) -> None:
        super().__init__(message)
        self.files = files

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:  # a worker's error comes back pickled
        return type(self), (str(self), *self.files)


class BusyError(RequestError):
    """Another run is at work on the same OUT."""


class MissingError(RequestError):
    """Something that must be installed, such as Java or torch, isn't."""


class JobError(PomonaError):
    """The Spark job failed for a reason that isn't a photo; the log file has the details."""


class CrashError(JobError):
    """The Spark job failed because its Python workers died."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
