"""OUT and its copy at another place: an object store, or a folder.

A place holds the files of OUT under their names, and ``_push.json``: which of them were put there,
with size and sha256. What that record names and OUT no longer has is removed there; what it doesn't
name is never touched. Files go in an order that a reader can trust: the manifest after the files
that it speaks of, removals last. What is about to be removed is noted as ``going``, and nobody
pulls it any more.

OUT remembers in ``.places.json`` what it last had in common with each place.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from pomona.core.errors import MismatchError
from pomona.core.files import FORMAT, read_json, sha256, write_json
from pomona.core.progress import OnTick, Tick, quiet
from pomona.workspace.layout import Out
from pomona.workspace.remote_folder import Entry, Place, drop_empty, refusing

log = logging.getLogger("pomona")

RECORD = "_push.json"
LOCK = "_lock.json"
PARTS = "_work/parts-"
PLAN = "_work/plan.json"
TABLE = ("features/_table.json", "features/_backbone.onnx")

TABLES_OF_FILES = ("_table.json", "projection.json", "model.json")
"""Files that name other files: they follow those."""

AT_ONCE = 8
RECORD_EVERY = 5.0
"""Seconds between writings of the record while files go up: what a kill makes a push do again."""

PARTS_SECONDS = 30.0
"""How long one sending of parts may hold up what comes after it."""

# --- OUT beside a place ------------------------------------------------------------------------


def scan(out: Out, *, work: bool) -> dict[str, os.stat_result]:
    """Return the files of OUT by name; with ``work`` also the parts of a run that isn't finished.

    Hidden names stay at home: the lock, and files that are being written.
    """
    found: dict[str, os.stat_result] = {}
    for folder, folders, names in os.walk(out.root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in names:
            path = Path(folder, file)
            name = path.relative_to(out.root).as_posix()
            if file.startswith(".") or name in (RECORD, LOCK):
                continue
            if not name.startswith("_work/") or (work and _goes_on(name)):
                with contextlib.suppress(FileNotFoundError):
                    found[name] = path.stat()
    return found


def _goes_on(name: str) -> bool:
    """Whether a run that goes on elsewhere needs it: the rest of _work is made again."""
    return name == PLAN or (name.startswith(PARTS) and name.endswith(".parquet"))


def rank(name: str) -> int:
    """Return when a file may go: 0 first, then those that name others, then the manifest."""
    if name == "manifest.json":
        return 2
    return 1 if name.rsplit("/", 1)[-1] in TABLES_OF_FILES else 0


class Mirror:
    """OUT, and what a place holds of it. One at a time writes; see `pomona.workspace.remote`.

    Raises
    ------
    RequestError
        If the place can't be listed.
    """

    def __init__(self, out: Out, place: Place) -> None:
        self.out, self.place = out, place
        with refusing(place, "read"):
            record = place.read_json(RECORD)
            self.sizes = place.sizes()
        if record.get("format", FORMAT) > FORMAT:
            raise MismatchError(f"{place} was pushed by a newer Pomona: update")
        files = record.get("files", {}).items()
        self.record: dict[str, Entry] = {name: e for name, e in files if _is_plain(name)}
        self.going: set[str] = self.record.keys() & set(record.get("going", []))
        self.revision: str | None = record.get("revision")
        known = read_json(out.places).get("places", {}).get(place.name, {})
        self.revisions: list[str] = known.get("revisions", [])
        self.common: dict[str, Entry] = known.get("files", {})
        self.pulling: bool = known.get("pulling", False)
        self._busy = threading.Lock()
        self._new = uuid.uuid4().hex

    @property
    def is_known(self) -> bool:
        """Whether nobody else has written there since OUT was last pushed or pulled."""
        return self.revision is None or (self.revision in self.revisions and not self.pulling)

    @property
    def is_behind(self) -> bool:
        """Whether OUT, which is but a copy of what the place holds, must be pulled first."""
        if self.revision is not None:
            return not self.is_known
        # No record. What was pushed and is gone was removed there, by somebody who starts anew;
        # files without a record were copied there.
        files = self.sizes.keys() - {RECORD, LOCK}
        return not self.revisions if files else bool(self.revisions)

    # up

    def push(
        self, *, work: bool = False, on_tick: OnTick = quiet, seconds: float | None = None
    ) -> dict[str, Any]:
        """Bring the place up to date; the caller holds OUT's lock.

        Parameters
        ----------
        work
            The parts of a run that isn't finished go too.
        seconds
            No upload starts after so many. What is left is then left out, and with it everything
            that speaks of it.

        Returns
        -------
        dict
            ``place``, ``files``, ``uploaded``, ``bytes``, ``deleted``, ``whole``.
        """
        with self._busy, refusing(self.place, "written"):
            here = scan(self.out, work=work)
            todo = {name: stat for name, stat in here.items() if not self._is_there(name, stat)}
            gone = sorted(self.record.keys() - here.keys())
            self.going -= here.keys()
            whole = self._upload(todo, on_tick, seconds, gone)
            if whole and gone:
                self._delete(gone)
            if not self.is_known:  # taken over as it was
                self._note()
        went = [name for name in todo if "sha256" in self.record.get(name, {})]
        return {
            "place": self.place.name,
            "files": len(here),
            "uploaded": len(went),
            "bytes": sum(self.record[name]["size"] for name in went),
            "deleted": len(gone) if whole else 0,
            "whole": whole,
        }

    def push_parts(self) -> int:
        """Send what a run has added since; nothing is removed. May run beside the stage.

        Returns
        -------
        int
            How many files went.
        """
        with self._busy:
            here = scan(self.out, work=True)
            # Without what made the table, parts are nobody's: it goes first. One that names files
            # is another matter: those must be there before it, and `push` sees to that.
            empty = not read_json(self.out.table_file).get("files", True)
            first = {n: s for n, s in here.items() if empty and n in TABLE}
            parts = {n: s for n, s in here.items() if n.startswith("_work/")}
            count = 0
            for files in (first, parts):
                todo = {n: stat for n, stat in files.items() if not self._is_there(n, stat)}
                if any(name != PLAN for name in todo):
                    self._upload(todo, quiet, PARTS_SECONDS)
                    count += len(todo)
            return count

    def _is_there(self, name: str, stat: os.stat_result) -> bool:
        """Whether the place holds this very file, by the record, and by its size there."""
        there = self.record.get(name, {})
        if "sha256" not in there or not there["size"] == self.sizes.get(name) == stat.st_size:
            return False
        if there["sha256"] != self._sha256(name, stat):
            return False
        self.common[name] = {**there, "modified": stat.st_mtime_ns}
        return True

    def _sha256(self, name: str, stat: os.stat_result) -> str | None:
        """Return a local file's digest, the one that is known if size and time are as they were."""
        known = self.common.get(name, {})
        if (known.get("size"), known.get("modified")) == (stat.st_size, stat.st_mtime_ns):
            return str(known["sha256"])
        with contextlib.suppress(FileNotFoundError):
            return sha256(self.out.root / name)
        return None

    def _upload(
        self,
        todo: dict[str, os.stat_result],
        on_tick: OnTick,
        seconds: float | None,
        gone: Iterable[str] = (),
    ) -> bool:
        """Send files. When all are there, and not earlier, ``gone`` is noted as going.

        Returns whether all are.
        """
        if not todo:
            if not self.going.issuperset(gone):
                self.going.update(gone)
                self._note()
            return True
        for name, stat in todo.items():  # first: what is there by our doing is in the record
            self.record[name] = {"size": stat.st_size}
        self._note()
        total, done = sum(stat.st_size for stat in todo.values()), 0
        end = time.monotonic() + seconds if seconds is not None else None
        noted = time.monotonic()

        def send(name: str) -> Entry:
            return self.place.upload(self.out.root / name, name)

        on_tick(Tick("push", 0, total))
        try:
            for name, entry in in_order(list(todo), send, end):
                if entry is None:  # it went while it was on the list, as parts do
                    del self.record[name]
                    continue
                self.record[name] = entry
                self.sizes[name] = entry["size"]
                self.common[name] = {**entry, "modified": todo[name].st_mtime_ns}
                done += todo[name].st_size
                on_tick(Tick("push", done, total))
                if time.monotonic() - noted > RECORD_EVERY:
                    self._note()
                    noted = time.monotonic()
        finally:
            whole = all("sha256" in self.record[name] for name in todo if name in self.record)
            if whole:
                self.going.update(gone)
            self._note()
        return whole

    def _delete(self, names: list[str]) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for name, _ in zip(names, pool.map(self.place.delete, names), strict=True):
                for known in (self.record, self.sizes, self.common):
                    known.pop(name, None)
                self.going.discard(name)
        self._note()

    def _note(self) -> None:
        """Write the record. OUT knows the new revision first, so that a kill between is no harm."""
        self.pulling = False
        if self.revision != self._new:
            self.revisions = [*([self.revision] if self.revision else []), self._new]
        self._remember()
        record = {"format": FORMAT, "revision": self._new, "files": self.record}
        record |= {"going": sorted(self.going)} if self.going else {}
        self.place.write_json(RECORD, record)
        self.revision = self._new

    def _remember(self) -> None:
        file = self.out.places
        known = read_json(file)
        known["format"] = FORMAT
        about = {"revisions": self.revisions, "files": self.common, "pulling": self.pulling}
        known.setdefault("places", {})[self.place.name] = about
        write_json(file, known)

    # down

    def pull(self, *, everything: bool, on_tick: OnTick = quiet) -> dict[str, Any]:
        """Bring OUT up to date with the place; the caller holds OUT's lock.

        Parameters
        ----------
        everything
            What the place doesn't have is removed from OUT; otherwise only what came from there.

        Returns
        -------
        dict
            ``place``, ``files``, ``downloaded``, ``bytes``, ``deleted``.
        """
        there = self._offered()
        with refusing(self.place, "read"):
            here = scan(self.out, work=True)
            todo = {n: e for n, e in there.items() if n not in here or not self._same(n, here[n])}
            candidates = set(here) if everything else set(self.common) & set(here)
            gone = sorted(candidates - there.keys())
            self.pulling = True
            self._remember()
            self._download(todo, on_tick)
            for name in gone:
                (self.out.root / name).unlink(missing_ok=True)
                drop_empty(self.out.root, name)
                self.common.pop(name, None)
            self.pulling = False
            self.revisions = [self.revision] if self.revision else []
            self._remember()
        return {
            "place": self.place.name,
            "files": len(there),
            "downloaded": len(todo),
            "bytes": sum(entry["size"] for entry in todo.values()),
            "deleted": len(gone),
        }

    def _offered(self) -> dict[str, Entry]:
        """Return what there is to pull: by the record, or, without one, by the listing."""
        if self.revision is None:
            names = [n for n in self.sizes if n not in (RECORD, LOCK) and _is_plain(n)]
            return {name: {"size": self.sizes[name]} for name in names}
        there = {}
        for name, entry in self.record.items():
            if name in self.going:
                continue
            if name in self.sizes:
                there[name] = {**entry, "size": self.sizes[name]}
            elif "sha256" in entry:
                raise MismatchError(
                    f"{name} is missing at {self.place}: if no run is at work there, push again "
                    "from the OUT that it came from"
                )
        return there

    def _same(self, name: str, stat: os.stat_result) -> bool:
        sha = self.record.get(name, {}).get("sha256")
        return sha is not None and sha == self._sha256(name, stat)

    def changed_here(self) -> list[str]:
        """Return the files of OUT that are neither as the place has them nor as it had them."""
        changed = []
        for name, stat in sorted(scan(self.out, work=False).items()):
            known = [files.get(name, {}).get("sha256") for files in (self.common, self.record)]
            if name != self.out.log.name and self._sha256(name, stat) not in known:
                changed.append(name)
        return changed

    def _download(self, todo: dict[str, Entry], on_tick: OnTick) -> None:
        total, done = sum(entry["size"] for entry in todo.values()), 0

        def fetch(name: str) -> Entry:
            path = self.out.root / name
            entry = self.place.download(name, path)
            if todo[name].get("sha256", entry["sha256"]) != entry["sha256"]:
                path.unlink()
                raise MismatchError(
                    f"{name} at {self.place} isn't what was pushed: push it again from its OUT"
                )
            return {**entry, "modified": path.stat().st_mtime_ns}

        if todo:
            on_tick(Tick("pull", 0, total))
        for name, entry in in_order(list(todo), fetch, None):
            if entry is None:
                raise MismatchError(f"{name} went from {self.place} while it was pulled: try again")
            self.common[name] = entry
            done += entry["size"]
            on_tick(Tick("pull", done, total))


def _is_plain(name: str) -> bool:
    """Whether a name leads into OUT and nowhere else: a record is a file that others can write."""
    return not any(part.startswith(".") or not part for part in name.split("/"))


def in_order(
    names: list[str], move: Callable[[str], Entry], end: float | None
) -> Iterator[tuple[str, Entry | None]]:
    """Move files, some at once, by `rank`. Yields each with what came, or None if it isn't there.

    After ``end`` (of the monotonic clock) no move starts, and no later rank is begun.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number in range(3):
            waiting = deque(name for name in sorted(names) if rank(name) == number)
            under_way: dict[Future[Entry], str] = {}
            while waiting or under_way:
                late = end is not None and time.monotonic() > end
                while waiting and not late and len(under_way) < AT_ONCE:
                    name = waiting.popleft()
                    under_way[pool.submit(move, name)] = name
                if not under_way:
                    return
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    name = under_way.pop(future)
                    try:
                        yield name, future.result()
                    except FileNotFoundError:
                        yield name, None
