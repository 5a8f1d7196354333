"""What a record says of its making: the time, and the versions at work."""

from __future__ import annotations

import contextlib
import platform
from datetime import datetime, timezone
from importlib import metadata


def utc_now() -> str:
    """Return the time, in UTC, as records hold it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions that may change a result."""
    found = {"python": platform.python_version()}
    for name in (
        "pomona",
        "pyspark",
        "pyarrow",
        "numpy",
        "pillow",
        "onnxruntime",
        "scikit-learn",
        "torch",
    ):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
