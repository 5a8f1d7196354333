"""The time and the versions of packages, for records of how a result was made."""

from __future__ import annotations

import contextlib
import platform
from datetime import datetime, timezone
from importlib import metadata


def utc_now() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that may change a result."""
    installed = {"python": platform.python_version()}
    packages = "pomona pyspark pyarrow numpy pillow onnxruntime scikit-learn torch"
    for name in packages.split():
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed
