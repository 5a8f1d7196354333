"""Photos that end or stall whatever decodes them."""

from __future__ import annotations

import os
from pathlib import Path

from tests.conftest import photo

CODE = """
# A native decoder below Pillow that crashes on one photo and never returns from another.
import ctypes, os, signal
from PIL import Image

true_open = Image.open

def open_or_worse(file, *words, **named):
    content = file.getvalue() if hasattr(file, "getvalue") else b""
    if b"this one crashes" in content:
        os.kill(os.getpid(), signal.SIGSEGV)
    if b"this one hangs" in content:
        ctypes.PyDLL(None).sleep(1000)  # with the interpreter's lock held
    return true_open(file, *words, **named)

Image.open = open_or_worse
"""


def install(folder: Path) -> dict[str, str]:
    """Return the environment of Pythons with that decoder, whose code goes into ``folder``."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CODE)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return {"PYTHONPATH": path, "POMONA_DECODE_SECONDS": "5"}


def add_photos(source: Path, folder: str = "Training/Fruit 1") -> None:
    """Add one photo that crashes that decoder, and one that stalls it."""
    for word in ("crashes", "hangs"):
        (source / folder / f"{word}.jpg").write_bytes(photo(1) + f"this one {word}".encode())
