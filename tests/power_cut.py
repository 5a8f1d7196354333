"""A disk that forgets: what a power cut leaves of a folder, after each fsync.

`Disk` records what is on the disk for good, as POSIX promises it: a file's bytes once it was
fsynced, a folder's names once that folder was. After each fsync there are two states worth trying.
In one all else is lost. In the other the names are there as they are now (file systems often write
them early), and files whose bytes weren't fsynced are empty.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NOT_OURS = (".lock", "pomona.log", "mlflow.db")
"""Files that nothing depends on, and one that SQLite brings to the disk by itself."""

Tree = dict[str, str | None]
"""By name relative to the root: a content's digest, or None for a folder."""


class Disk:
    """What is on the disk below a folder that exists, and the states that power cuts leave."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.states = root, list[Tree]()
        self._contents: dict[str, bytes] = {}
        self._files: dict[int, str] = {}  # digest by inode
        self._folders: dict[int, dict[str, tuple[int, bool]]] = {}  # names by inode
        self._held: dict[int, int] = {}  # open files: an inode isn't used again meanwhile
        for folder, _, names in os.walk(root):
            self._keep_folder(Path(folder))
            for name in names:
                self._keep_file(Path(folder, name))
        self._true_fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._fsync)

    def close(self) -> None:
        for number in self._held.values():
            os.close(number)

    def _hold(self, path: Path) -> int:
        inode = path.stat().st_ino
        if inode not in self._held:
            self._held[inode] = os.open(path, os.O_RDONLY)
        return inode

    def _keep_file(self, path: Path) -> None:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        self._contents[digest] = content
        self._files[self._hold(path)] = digest

    def _keep_folder(self, path: Path) -> None:
        inside = list(path.iterdir())
        names = {entry.name: (self._hold(entry), entry.is_dir()) for entry in inside}
        self._folders[self._hold(path)] = names

    def _fsync(self, number: int) -> None:
        path = Path(f"/proc/self/fd/{number}").readlink()
        if path == self.root or self.root in path.parents:
            self._note(self._early())
            self._keep_folder(path) if path.is_dir() else self._keep_file(path)
            self._note(self._strict(self.root.stat().st_ino))
            self._note(self._early())
        self._true_fsync(number)

    def _note(self, state: Tree) -> None:
        if state not in self.states:
            self.states.append(state)

    def _strict(self, inode: int, start: str = "") -> Tree:
        tree: Tree = {}
        for name, (child, is_folder) in self._folders.get(inode, {}).items():
            tree[start + name] = None if is_folder else self._digest(child)
            if is_folder:
                tree |= self._strict(child, f"{start}{name}/")
        return tree

    def _early(self) -> Tree:
        tree: Tree = {}
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            tree[name] = None if path.is_dir() else self._digest(path.stat().st_ino)
        return tree

    def _digest(self, inode: int) -> str:
        return self._files.get(inode) or self._empty()

    def _empty(self) -> str:
        digest = hashlib.sha256(b"").hexdigest()
        self._contents[digest] = b""
        return digest

    def check(self) -> None:
        """Check that a power cut now, when the command has ended, loses none of its files."""
        kept = self._strict(self.root.stat().st_ino)
        for path in self.root.rglob("*"):
            if path.is_file() and path.name not in NOT_OURS:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                assert kept.get(path.relative_to(self.root).as_posix()) == digest, path

    def restore(self, state: Tree) -> None:
        """Make the folder what a power cut has left."""
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, digest in state.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if digest is None else path.write_bytes(self._contents[digest])


def cuts(
    root: Path, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch, step: int = 1
) -> Iterator[str]:
    """Record an action; then make the folder what each power cut during it leaves, one by one.

    With a larger ``step``, only each second or third state is tried.
    """
    with monkeypatch.context() as patch:
        disk = Disk(root, patch)
        action()
        disk.check()
    for number, state in list(enumerate(disk.states))[::step]:
        disk.restore(state)
        yield f"{number + 1} of {len(disk.states)}: {sorted(state)}"
    disk.close()


class Here:
    """An engine that runs tasks in this process, whose fsyncs are recorded."""

    most_photos = 8
    slots = 1

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self) -> None:
        pass

    def fit(self, spec: Any) -> Any:
        return spec

    def check(self, spec: Any, source: Any, paths: list[str]) -> None:
        pass

    def run_tasks(self, task: Any, count: int, folder: Path, poll: Any = None) -> list[Any]:
        return [task(number) for number in range(count)]

    def run_chunks(self, task: Any, numbers: Any, folder: Path, poll: Any = None) -> None:
        from pomona.engine.engine import InPlace

        for number in numbers:
            InPlace(task)(number)
