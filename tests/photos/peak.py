"""Decode files, each in a process of its own, and say what it took: python -m tests.photos.peak."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pomona.photos.decoding import MAX_DECODED, decode, estimate


class Taken(NamedTuple):
    """What decoding one file took, beside its own bytes, and what was estimated."""

    memory: int  # bytes
    seconds: float  # of CPU
    error: str | None
    estimated_memory: int
    estimated_seconds: float


def measure(files: Mapping[str, bytes], folder: Path, most: int = MAX_DECODED) -> dict[str, Taken]:
    """Decode contents by name; one process measures, and has held nothing before."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    root = Path(__file__).resolve().parents[2]
    told = subprocess.run(
        [sys.executable, "-m", __name__, str(most), *(str(folder / name) for name in files)],
        stdout=subprocess.PIPE,
        check=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
    )
    return {name: Taken(*row) for name, row in json.loads(told.stdout).items()}


def _in_a_child(path: Path, most: int) -> Taken:
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        content = path.read_bytes()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        error = decode(content, 224, most).error
        seconds = time.process_time() - start
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        told = json.dumps([memory, seconds, error, *estimate(content, 224, most)])
        os.write(theirs, told.encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as file:
        told = file.read()
    os.waitpid(child, 0)
    return Taken(*json.loads(told)) if told else Taken(0, 0.0, "died", 0, 0.0)


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    decode((Path(__file__).parents[1] / "data" / "none").name.encode(), 224)  # modules are loaded
    _, most, *paths = sys.argv
    json.dump({Path(p).name: _in_a_child(Path(p), int(most)) for p in paths}, sys.stdout)
