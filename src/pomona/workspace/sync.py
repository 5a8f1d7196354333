"""OUT and its copy at another place: an object store, or a folder.

A place holds the files of OUT under their names, and ``_push.json``: which of them were put there,
with size and sha256. What the record names and OUT no longer has is removed there; other files are
never touched. OUT remembers in ``.places.json`` what it last had in common with each place.

`pomona.workspace.sync_plan` decides what is copied and removed; here it is done.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from pomona.core.errors import MismatchError
from pomona.core.files import read_json
from pomona.core.progress import OnTick, Tick, quiet
from pomona.workspace.remote_folder import Entry, drop_empty, refusing
from pomona.workspace.sync_plan import Files, Plan, offer, plan_parts, plan_pull, plan_push
from pomona.workspace.sync_state import Copy, local_files

AT_ONCE = 8
"""Files that are copied at a time."""

RECORD_EVERY = 5.0
"""Seconds between two writings of the record during uploads: after a kill, that much is redone."""

PARTS_SECONDS = 30.0
"""Seconds after which no upload of parts starts, so that a stage's end needn't wait for long."""


def push_files(
    copy: Copy, *, work: bool = False, on_tick: OnTick = quiet, seconds: float | None = None
) -> dict[str, Any]:
    """Bring the place up to date; the caller holds OUT's lock.

    With ``work`` the parts of an unfinished run go, too. No upload starts after so many
    ``seconds``: the rest isn't pushed then, nor anything that names it.
    """
    with copy.busy, refusing(copy.place, "written"):
        local = local_files(copy, work=work)
        plan = plan_push(local, copy.record.files, copy.sizes)
        whole = _apply_push(copy, plan, local, on_tick, seconds)
        if not copy.is_known:  # another OUT pushed these very files: now they are this one's
            copy.note()
    sent = [copy.record.files[name] for name in plan.names if name in copy.record.files]
    sent = [entry for entry in sent if "sha256" in entry]
    return {
        "place": copy.place.name,
        "files": len(local),
        "uploaded": len(sent),
        "bytes": sum(entry["size"] for entry in sent),
        "deleted": len(plan.remove) if whole else 0,
        "whole": whole,
    }


def push_parts(copy: Copy) -> int:
    """Push a run's new parts, in a thread beside the stage. Returns the number of files sent."""
    with copy.busy:
        local = local_files(copy, work=True)
        empty = not read_json(copy.out.table_file).get("files", True)
        plan = plan_parts(local, copy.record.files, copy.sizes, table_empty=empty)
        _apply_push(copy, plan, local, quiet, PARTS_SECONDS)
        return len(plan.names)


def _apply_push(
    copy: Copy, plan: Plan, local: Files, on_tick: OnTick, seconds: float | None
) -> bool:
    """Upload, then remove. Returns whether all uploads are done."""
    copy.record.going -= {*plan.names, *plan.same}  # OUT has them again
    for name in plan.same:
        entry = copy.record.files[name]
        copy.common.files[name] = {**entry, "modified": local[name]["modified"]}
    whole = _upload(copy, plan, local, on_tick, seconds)
    if whole and plan.remove:
        _remove(copy, plan.remove)
    return whole


def _upload(copy: Copy, plan: Plan, local: Files, on_tick: OnTick, seconds: float | None) -> bool:
    """Upload the plan's files; once all are there, note what will be removed as going."""
    record, names = copy.record, plan.names
    if not names and record.going.issuperset(plan.remove):
        return True
    for name in names:  # before any upload, so that the record has all that a killed push leaves
        record.files[name] = {"size": local[name]["size"]}
    if names:
        copy.note()
        on_tick(Tick("push", 0, total := sum(local[name]["size"] for name in names)))
    done, noted = 0, time.monotonic()
    end = noted + seconds if seconds is not None else None
    try:
        for name, entry in copied(plan, lambda n: copy.place.upload(copy.out.root / n, n), end):
            if entry is None:  # removed from OUT meanwhile, as parts are when extract ends
                del record.files[name]
                continue
            record.files[name] = entry
            copy.sizes[name] = entry["size"]
            copy.common.files[name] = {**entry, "modified": local[name]["modified"]}
            done += local[name]["size"]
            on_tick(Tick("push", done, total))
            if time.monotonic() - noted > RECORD_EVERY:
                copy.note()
                noted = time.monotonic()
    finally:
        whole = all("sha256" in record.files.get(name, {"sha256": ""}) for name in names)
        if whole:
            record.going.update(plan.remove)
        copy.note()
    return whole


def _remove(copy: Copy, names: list[str]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, _ in zip(names, pool.map(copy.place.delete, names), strict=True):
            for files in (copy.record.files, copy.sizes, copy.common.files):
                files.pop(name, None)
            copy.record.going.discard(name)
    copy.note()


def pull_files(copy: Copy, *, everything: bool, on_tick: OnTick = quiet) -> dict[str, Any]:
    """Bring OUT up to date with the place; the caller holds OUT's lock.

    With ``everything`` all that the place doesn't have is removed from OUT; otherwise only what
    came from there. Raises MismatchError if the place doesn't hold what was pushed, RequestError
    if it can't be read.
    """
    record, common = copy.record, copy.common
    offered = offer(record.files if record.revision else None, record.going, copy.sizes, copy.place)
    with refusing(copy.place, "read"):
        local = local_files(copy, work=True)
        plan = plan_pull(local, offered, common.files, everything=everything)
        for name in plan.same:
            common.files[name] = {**offered[name], "modified": local[name]["modified"]}
        common.pulling = True
        common.write(copy.out, copy.place)
        _download(copy, plan, offered, on_tick)
        for name in plan.remove:
            (copy.out.root / name).unlink(missing_ok=True)
            drop_empty(copy.out.root, name)
            common.files.pop(name, None)
        common.pulling = False
        common.revisions = [record.revision] if record.revision else []
        common.write(copy.out, copy.place)
    return {
        "place": copy.place.name,
        "files": len(offered),
        "downloaded": len(plan.names),
        "bytes": sum(offered[name]["size"] for name in plan.names),
        "deleted": len(plan.remove),
    }


def _download(copy: Copy, plan: Plan, offered: Files, on_tick: OnTick) -> None:
    def fetch(name: str) -> Entry:
        path = copy.out.root / name
        entry = copy.place.download(name, path)
        if offered[name].get("sha256", entry["sha256"]) != entry["sha256"]:
            path.unlink()
            raise MismatchError(
                f"{name} at {copy.place} isn't what was pushed: push it again from its OUT"
            )
        return {**entry, "modified": path.stat().st_mtime_ns}

    total, done = sum(offered[name]["size"] for name in plan.names), 0
    if plan.waves:
        on_tick(Tick("pull", 0, total))
    for name, entry in copied(plan, fetch):
        if entry is None:
            raise MismatchError(f"{name} went from {copy.place} while it was pulled: try again")
        copy.common.files[name] = entry
        done += entry["size"]
        on_tick(Tick("pull", done, total))


def copied(
    plan: Plan, copy_one: Callable[[str], Entry], end: float | None = None
) -> Iterator[tuple[str, Entry | None]]:
    """Copy the plan's files, `AT_ONCE` at a time, wave by wave.

    After ``end`` (of the monotonic clock) no copy starts, and no later wave begins. Yields each
    name and what was copied, or None if the file isn't there any more.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for wave in plan.waves:
            waiting = deque(wave)
            under_way: dict[Future[Entry], str] = {}
            while waiting or under_way:
                late = end is not None and time.monotonic() > end
                while waiting and not late and len(under_way) < AT_ONCE:
                    name = waiting.popleft()
                    under_way[pool.submit(copy_one, name)] = name
                if not under_way:
                    return
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    name = under_way.pop(future)
                    try:
                        yield name, future.result()
                    except FileNotFoundError:
                        yield name, None
