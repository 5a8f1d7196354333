"""What is known of OUT and its copy: the files of both, and the records that say what was pushed.

``_push.json`` lies at the place, ``.places.json`` in OUT.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path

from pomona.core.errors import MismatchError
from pomona.core.files import FORMAT, read_json, sha256, write_json
from pomona.workspace.layout import Out
from pomona.workspace.lease import LOCK
from pomona.workspace.remote_folder import Entry, Place, refusing
from pomona.workspace.sync_plan import EXTRACT_PLAN, PARTS, Files, changed_since, is_plain

log = logging.getLogger("pomona")

RECORD = "_push.json"


@dataclass
class Record:
    """What was pushed to a place, as ``_push.json`` there says.

    ``files`` are those that were put there, without sha256 before an upload has ended; ``going``
    names those that are about to be removed: nobody pulls them any more.
    """

    revision: str | None = None  # a new one with each writing; None if there is no record
    files: Files = field(default_factory=dict)
    going: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, place: Place) -> Record:
        """Read it. Raises MismatchError if a newer Pomona wrote it, and OSError."""
        record = place.read_json(RECORD)
        if record.get("format", FORMAT) > FORMAT:
            raise MismatchError(f"{place} was pushed by a newer Pomona: update")
        files = {name: e for name, e in record.get("files", {}).items() if is_plain(name)}
        if strange := sorted(record.get("files", {}).keys() - files.keys()):
            log.warning("names in %s that lead out of OUT are left out: %s", place, strange)
        return cls(record.get("revision"), files, files.keys() & set(record.get("going", [])))

    def write(self, place: Place) -> None:
        """Write it whole."""
        record = {"format": FORMAT, "revision": self.revision, "files": self.files}
        place.write_json(RECORD, record | ({"going": sorted(self.going)} if self.going else {}))


@dataclass
class Common:
    """What OUT and a place last had in common, as OUT's ``.places.json`` says.

    ``revisions`` are those of the record that OUT wrote or pulled: if the record has another one
    now, somebody else has written there.
    """

    revisions: list[str] = field(default_factory=list)
    files: Files = field(default_factory=dict)  # that both had
    pulling: bool = False  # whether a pull had begun and not ended

    @classmethod
    def read(cls, out: Out, place: Place) -> Common:
        """Read what OUT knows of a place."""
        return cls(**read_json(out.places).get("places", {}).get(place.name, {}))

    def write(self, out: Out, place: Place) -> None:
        """Write it beside what OUT knows of other places."""
        places = read_json(out.places).get("places", {})
        write_json(out.places, {"format": FORMAT, "places": {**places, place.name: vars(self)}})


@dataclass
class Copy:
    """OUT, its copy at a place, and what is known of both.

    One process writes there at a time (`pomona.workspace.lease`), and one of its threads (`busy`).
    """

    out: Out
    place: Place
    record: Record
    common: Common
    sizes: dict[str, int]  # bytes of each file at the place
    busy: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_known(self) -> bool:
        """Whether nobody else has written there since OUT was last pushed or pulled."""
        revision, common = self.record.revision, self.common
        return revision is None or (revision in common.revisions and not common.pulling)

    @property
    def is_behind(self) -> bool:
        """Whether a working copy of what the place holds must be pulled before it is used."""
        if self.record.revision is not None:
            return not self.is_known
        # No record. If OUT had been pushed, somebody has removed it there, to start anew; if there
        # are files, another program copied them.
        return not self.common.revisions if self.sizes else bool(self.common.revisions)

    def note(self) -> None:
        """Write the record, under a new revision.

        OUT knows that revision first, so that a kill between the two writings does no harm.
        """
        new = uuid.uuid4().hex
        # The earlier ones stay until this one is there: a write that failed may have arrived.
        revisions = (*self.common.revisions, self.record.revision, new)
        self.common.revisions, self.common.pulling = [r for r in revisions if r], False
        self.common.write(self.out, self.place)
        replace(self.record, revision=new).write(self.place)
        self.record.revision, self.common.revisions = new, [new]


def open_copy(out: Out, place: Place) -> Copy:
    """Read and list what is known of OUT's copy at a place.

    Raises RequestError if it can't be listed, or (MismatchError) a newer Pomona wrote there.
    """
    with refusing(place, "read"):
        record, sizes = Record.read(place), place.sizes()
    sizes = {name: size for name, size in sizes.items() if name not in (RECORD, LOCK)}
    return Copy(out, place, record, Common.read(out, place), sizes)


def scan(out: Out, *, work: bool) -> dict[str, os.stat_result]:
    """Return the files of OUT by name; with ``work`` also the parts of an unfinished run.

    Without hidden files (the lock, and files that are being written), and without names that no
    pull takes.
    """
    stats: dict[str, os.stat_result] = {}
    for folder, folders, names in os.walk(out.root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in names:
            path = Path(folder, file)
            name = path.relative_to(out.root).as_posix()
            if not is_plain(name) or name in (RECORD, LOCK):
                continue
            if not name.startswith("_work/") or (work and _resumes(name)):
                with contextlib.suppress(FileNotFoundError):
                    stats[name] = path.stat()
    return stats


def _resumes(name: str) -> bool:
    """Whether a run that is resumed elsewhere needs a file of ``_work``; it makes the others."""
    return name == EXTRACT_PLAN or (name.startswith(PARTS) and name.endswith(".parquet"))


def local_files(copy: Copy, *, work: bool) -> Files:
    """Describe the files of OUT.

    ``sha256`` is the known one if size and time haven't changed. Else it is computed if the file
    has the size of what was or is at the place; otherwise the size shows that they differ.
    """
    files: Files = {}
    for name, stat in scan(copy.out, work=work).items():
        entry: Entry = {"size": stat.st_size, "modified": stat.st_mtime_ns}
        last, there = copy.common.files.get(name, {}), copy.record.files.get(name, {})
        if (last.get("size"), last.get("modified")) == (stat.st_size, stat.st_mtime_ns):
            entry["sha256"] = last["sha256"]
        elif stat.st_size in (last.get("size"), there.get("size")):
            with contextlib.suppress(FileNotFoundError):
                entry["sha256"] = sha256(copy.out.root / name)
        files[name] = entry
    return files


def changed_here(copy: Copy) -> list[str]:
    """Return the files of OUT, but the log, that the place neither has nor had."""
    local = local_files(copy, work=False)
    local.pop(copy.out.log.name, None)
    return changed_since(local, copy.record.files, copy.common.files)
