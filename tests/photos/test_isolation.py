"""The child process that decodes, and what is sent to executors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pytest
from PIL import ImageFile

from pomona.photos import isolation
from pomona.photos.decoding import decode
from pomona.spark import executors
from tests.conftest import photo


@pytest.fixture(autouse=True)
def _no_child_left() -> Iterator[None]:
    def end() -> None:
        if hasattr(isolation._own, "child"):
            isolation._own.child.end()
            del isolation._own.child

    end()
    yield
    end()


def test_a_child_decodes_as_the_parent_does() -> None:
    for content in (photo(3), photo(4, (640, 480)), photo(5, kind="PNG"), b"no photo", b"", None):
        here, there = decode(content, 32), isolation.decode_apart(content, 32)
        assert (there.width, there.height, there.error) == (here.width, here.height, here.error)
        if here.pixels is None:
            assert there.pixels is None
        else:
            assert there.pixels is not None
            assert np.array_equal(here.pixels, there.pixels)


def worse(pipe: Connection) -> None:
    """A child whose decoder crashes on one photo and stalls on another."""
    pipe.send(isolation.READY)
    while True:
        content, size, most, ImageFile.LOAD_TRUNCATED_IMAGES = pipe.recv()
        if content == b"crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if content == b"hang":
            time.sleep(1000)
        pipe.send(tuple(decode(content, size, most)))


def test_one_photo_costs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_serve", worse)
    monkeypatch.setenv("POMONA_DECODE_SECONDS", "2")
    good = photo(3)
    found = [isolation.decode_apart(c, 32).error for c in (good, b"crash", good, b"hang", good)]
    assert found == [None, "crashed", None, "crashed", None]


def test_a_child_that_died_of_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    good = photo(3)
    assert isolation.decode_apart(good, 32).error is None
    os.kill(isolation._child().process.pid, signal.SIGKILL)
    isolation._child().process.join()
    assert isolation.decode_apart(good, 32).error is None, "the photo is not to blame"


def test_a_child_that_stalls_outlives_no_parent() -> None:
    """The parent is killed while the child decodes: nobody else would end it.

    `run` returns when all have closed stderr, the child too: it has ended.
    """
    script = (
        "import os, signal, sys, threading, time\n"
        "from pomona.photos import isolation\n"
        "from tests.photos import test_isolation as test_guard\n"
        "if __name__ == '__main__':\n"
        "    isolation._serve = test_guard.stalls\n"
        "    isolation._child().wait()\n"
        "    isolation._child().pipe.send((b'x', 32, 10**6, False))\n"
        "    time.sleep(0.5)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = str(Path(__file__).parents[2])
    told = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ
        | {"POMONA_DECODE_SECONDS": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        timeout=300,
    )
    assert told.stdout.strip() == "called"
    assert "Timeout" in told.stderr, "the watch ended it"
    assert "Error" not in told.stderr


def stalls(pipe: Connection) -> None:
    """A child whose decoder never ends; it has the real one's signature."""

    def never_ends(*args: object) -> None:
        print("called", flush=True)
        time.sleep(1000)

    vars(isolation)["decode"] = create_autospec(decode, side_effect=never_ends)
    isolation._serve(pipe)


def test_a_script_that_has_no_main_guard_runs_once(tmp_path: Path) -> None:
    """`multiprocessing` would run it again in the child."""
    (tmp_path / "photo.jpg").write_bytes(photo(3))
    (tmp_path / "script.py").write_text(
        "from pathlib import Path\n"
        "from pomona.photos.isolation import decode_apart\n"
        "print(decode_apart(Path('photo.jpg').read_bytes(), 32).error)\n"
    )
    told = subprocess.run(
        [sys.executable, "script.py"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert told.stdout == "None\n"


def test_as_much_of_a_damaged_photo_as_there_is() -> None:
    damaged = photo(3, (640, 480))[:-3000]
    assert isolation.decode_apart(damaged, 32, partial=True).pixels is not None
    assert isolation.decode_apart(damaged, 32).error == "truncated", "of this photo only"


def dies(pipe: Connection) -> None:
    pipe.close()


def test_a_child_that_doesnt_start_is_no_fault_of_the_photo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(isolation, "_serve", dies)
    with pytest.raises(RuntimeError, match="doesn't start"):
        isolation.decode_apart(photo(3), 32)


def test_the_watch_ends_a_process_that_stalls() -> None:
    script = (
        "import time\nfrom pomona.photos.isolation import watched\nwith watched(): time.sleep(30)"
    )
    told = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"POMONA_DECODE_SECONDS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 1, "it did not sleep to the end"
    assert "Timeout" in told.stderr


def test_the_archive_is_the_package(tmp_path: Path) -> None:
    package = Path(executors.__file__).parents[1]
    archive = executors.pack(package, tmp_path)
    (tmp_path / "again").mkdir()
    assert executors.pack(package, tmp_path / "again").name == archive.name
    with zipfile.ZipFile(archive) as packed:
        assert "pomona/spark/tasks.py" in packed.namelist()
    script = "import pomona.spark.tasks; print(pomona.spark.tasks.__file__)"
    told = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(archive)},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert told.stdout.startswith(str(archive))
