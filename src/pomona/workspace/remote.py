"""OUT on an object store: worked on in a folder of the driver, and kept up to date at the store.

A driver may be lost with its disk. So OUT is pulled before the work, the parts of a run are pushed
as they come, and everything is pushed after each stage. Executors see nothing of this.

There is one writer at a time (`pomona.workspace.lease`): ``_lock.json`` says who, and is rewritten
every few seconds. Arrow's object stores have no conditional write, so that a writer reads the lock
again after `SETTLE` seconds, in case two start at once, and a writer that was silent for `SILENT`
seconds may find that another has taken over; it then stops.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pomona.core.errors import BusyError, PomonaError, RequestError, first_line
from pomona.core.files import atomic_file, cache_folder, read_json, sha256
from pomona.core.progress import OnTick, Tick, quiet
from pomona.core.uris import is_store, local_path
from pomona.photos.source import open_source
from pomona.workspace import layout
from pomona.workspace.layout import Out
from pomona.workspace.lease import LAST_SECONDS, Lease, every, is_leased, leased
from pomona.workspace.remote_folder import Place, open_place, refusing
from pomona.workspace.sync import pull_files, push_files, push_parts
from pomona.workspace.sync_state import Copy, changed_here, open_copy, scan

log = logging.getLogger("pomona")

PUSH_EVERY = 5.0
"""Seconds between pushes of new parts: a lost driver loses that much, and the running tasks."""


def push(
    out: str | Path, place: str, on_tick: OnTick = quiet, *, replace: bool = False
) -> dict[str, Any]:
    """Copy a finished OUT to an object store or another folder; a killed push can be repeated.

    Raises RequestError (or a subclass) if OUT isn't finished, somebody is at work on either side,
    or (without ``replace``) the place holds what another OUT pushed.
    """
    folder = layout.open_out(out, must_exist=True)
    to = open_place(place)
    _refuse_nesting(folder, to)
    if not read_json(folder.table_file).get("files"):
        raise RequestError(f"there are no results in {out}: pomona extract SOURCE --out {out}")
    started = time.monotonic()
    with layout.lock(folder), leased(to, on_tick):
        if (folder.work / "plan.json").exists():
            raise RequestError(
                f"extract isn't finished in {out}: run the same pomona extract again, it goes on"
            )
        copy = open_copy(folder, to)
        if not (copy.is_known or replace):
            raise RequestError(
                f"{to} holds what another OUT pushed, or another machine since: choose another "
                "place, pull it first, or add --replace"
            )
        record = push_files(copy, on_tick=on_tick)
    return {**record, "seconds": round(time.monotonic() - started, 2)}


def pull(place: str, out: str | Path, on_tick: OnTick = quiet) -> dict[str, Any]:
    """Copy an OUT from where it was pushed, and check every file; a killed pull can be repeated.

    Raises RequestError (or a subclass) if there is nothing, somebody is at work on either side, or
    OUT has results that the place doesn't know.
    """
    source = open_place(place)
    if is_leased(source):
        raise BusyError(f"another pomona run is at work on {source}: pull when it has ended")
    existed = local_path(str(out)).exists()
    folder = layout.open_out(out)
    _refuse_nesting(folder, source)
    started = time.monotonic()
    with contextlib.nullcontext() if existed else _tidy(folder), layout.lock(folder):
        copy = open_copy(folder, source)
        _refuse_nothing(copy)
        if not copy.common.pulling and (changed := changed_here(copy)):
            raise RequestError(
                f"{out} has {changed[0]}, which {source} doesn't know: push it there first, or "
                "pull into a new folder"
            )
        record = pull_files(copy, everything=False, on_tick=on_tick)
    return {**record, "seconds": round(time.monotonic() - started, 2)}


def _refuse_nothing(copy: Copy) -> None:
    names = copy.record.files.keys() | copy.sizes.keys()
    if names.isdisjoint({"manifest.json", "features/_table.json"}):
        raise RequestError(
            f"{copy.place} holds nothing of Pomona's: pomona extract SOURCE --out {copy.place}, or "
            "pomona push, puts it there"
        )


def _refuse_nesting(out: Out, place: Place) -> None:
    folder = Path(place.root)
    if not place.store and (folder.is_relative_to(out.root) or out.root.is_relative_to(folder)):
        raise RequestError(f"{place} and {out.root} lie in one another: choose another place")


@dataclass
class Home:
    """The folder that a command works in.

    ``after`` is to be called with a stage's name when that has ended: it pushes, if OUT is
    elsewhere.
    """

    folder: str  # on this machine
    name: str  # OUT as the user named it
    after: Callable[[str], None] = field(default=lambda _: None)
    running: bool = False  # whether somebody else is at work on OUT now
    lease: Lease | None = None  # the lock of the place, if OUT is elsewhere

    def ticks(self, on_tick: OnTick) -> OnTick:
        """Wrap a stage's ``on_tick`` so that it raises BusyError once another has taken over."""

        def tick(done: Tick) -> None:
            if self.lease and self.lease.lost:
                raise self.lease.lost
            on_tick(done)

        return tick

    def shown(self, path: str | Path) -> str:
        """Return a path of this machine as it reads below the OUT that the user named."""
        return str(path).replace(self.folder, self.name)


@contextlib.contextmanager
def opened(
    out: str, on_tick: OnTick = quiet, *, source: str | None = None, look_only: bool = False
) -> Iterator[Home]:
    """Yield the folder to work in for OUT, and keep the object store up to date meanwhile.

    A folder is used as it is. OUT must not lie in ``source``, where photos are read from; without
    a source OUT must exist. With ``look_only`` no lock is taken at the store and nothing is pushed.
    Raises BusyError if another process is at work on OUT, RequestError (or another subclass) if
    OUT can't be reached, or there is none.
    """
    if not is_store(out):
        yield Home(out, out)
        return
    place = open_place(out)
    if source is not None:
        _refuse_photos(place, source)
    folder = copy_of(place)
    try:
        with (
            _looking(place, folder, on_tick)
            if look_only
            else _writing(place, folder, on_tick, must_exist=source is None) as home
        ):
            yield home
    except PomonaError as error:  # a user who named a URI doesn't know the folder
        raise type(error)(str(error).replace(str(folder), place.name)) from error


def copy_of(place: Place) -> Path:
    """Return the folder of this machine that holds the working copy of a place's OUT."""
    digest = hashlib.sha256(place.name.encode()).hexdigest()[:16]
    return (cache_folder() / "out" / digest).resolve()


def _refuse_photos(place: Place, source: str) -> None:
    if not is_store(source):
        return
    photos = open_source(source)
    a, b = (urlsplit(name)._replace(scheme="").geturl() + "/" for name in (place.name, photos.name))
    if a.startswith(b) or b.startswith(a):
        raise RequestError(f"--out {place} and the source lie in one another: choose another place")


@contextlib.contextmanager
def _looking(place: Place, folder: Path, on_tick: OnTick) -> Iterator[Home]:
    folder.mkdir(parents=True, exist_ok=True)
    out = layout.open_out(folder)
    with _tidy(out):
        running = is_leased(place)
        if not layout.is_locked(out):  # a run of this machine keeps the folder up to date itself
            with layout.lock(out):
                copy = open_copy(out, place)
                if copy.is_behind:
                    pull_files(copy, everything=True, on_tick=on_tick)
                if not out.table_file.exists():
                    _refuse_nothing(copy)
        yield Home(str(folder), place.name, running=running)


@contextlib.contextmanager
def _writing(place: Place, folder: Path, on_tick: OnTick, *, must_exist: bool) -> Iterator[Home]:
    folder.mkdir(parents=True, exist_ok=True)
    out = layout.open_out(folder)
    with _tidy(out), leased(place, on_tick) as lease:
        with layout.lock(out):
            copy = open_copy(out, place)
            if copy.is_behind:
                pull_files(copy, everything=True, on_tick=on_tick)
            if must_exist and not out.table_file.exists():
                _refuse_nothing(copy)

        def push(_: str = "", seconds: float | None = None) -> None:
            with refusing(place, "written"):
                lease.check()
            with layout.lock(out):  # it first finishes a commit that a stage had begun
                if out.table_file.exists():
                    push_files(copy, work=True, on_tick=on_tick, seconds=seconds)

        def push_new_parts() -> None:
            lease.check()
            push_parts(copy)

        try:
            with every(PUSH_EVERY, push_new_parts, "parts"):
                yield Home(str(folder), place.name, push, lease=lease)
        except BaseException:
            _push_at_last(place, push)
            raise
        push()


@contextlib.contextmanager
def _tidy(out: Out) -> Iterator[None]:
    """Remove the folder afterwards if it holds no results."""
    try:
        yield
    finally:
        # A run that is still listing its source has no results yet, but it holds the lock.
        with contextlib.suppress(RequestError), layout.lock(out):
            if not scan(out, work=True).keys() - {out.log.name}:
                shutil.rmtree(out.root, ignore_errors=True)


def _push_at_last(place: Place, push: Callable[..., None]) -> None:
    """Push what a failed or interrupted run has done; an error here must not hide the first one."""
    try:
        push(seconds=LAST_SECONDS)
    except PomonaError as error:
        log.warning("not everything was pushed to %s: %s", place, first_line(error))


MODEL_FILES = ("model.onnx", "classifier.safetensors")
SIGNATURE = "model.sig"
"""Beside a model's files, if it was signed (`pomona.model.signature`)."""


def fetch_model(uri: str) -> Path:
    """Copy a model's folder from an object store into the cache, and return the copy's path.

    A file that is in the cache, and has the digest that ``model.json`` gives, isn't fetched again.
    Loading the model checks all digests. Raises RequestError if there is none, or it can't be read.
    """
    place = open_place(uri)
    with refusing(place, "read"):
        try:
            about = place.read_bytes("model.json")
        except FileNotFoundError:
            raise RequestError(
                f"there is no model in {place}: it is the folder model of a pushed OUT"
            ) from None
        digest = hashlib.sha256(place.name.encode() + b"\0" + about).hexdigest()[:16]
        folder = cache_folder() / "models" / digest
        with atomic_file(folder / "model.json") as part:
            part.write_bytes(about)
        digests = _digests(about)
        for name in MODEL_FILES:
            file = folder / name
            if not file.is_file() or sha256(file) != digests.get(name):
                place.download(name, file)
        try:
            place.download(SIGNATURE, folder / SIGNATURE)
        except FileNotFoundError:
            (folder / SIGNATURE).unlink(missing_ok=True)
    return folder


def _digests(about: bytes) -> dict[str, Any]:
    """Return the digests in a ``model.json``; none if it is damaged, as loading will say."""
    try:
        return dict(json.loads(about)["digests"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}
