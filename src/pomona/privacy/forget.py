"""The stage ``forget``: erase photos from OUT, and never take them in again.

Its phases, in order, are the lines of the function `forget`. From ``begin`` on the file
``OUT/forgotten/pending.json`` names the phase, and a kill is made good by the same command, by
`forget` without photos, or by `finish`, which other commands call:

===========  =====================================================  ==============================
phase        what it does                                           after a kill in it
===========  =====================================================  ==============================
select       tells which photos are meant, or refuses;              nothing has changed
             a dry run returns the plan
begin        writes tombstones and ``pending.json``, in one commit  nothing has changed, or all is
                                                                    decided and ``erase`` follows
``erase``    cleans copies one by one; then removes the photos      ``erase`` starts again
             from tables and lists, and what was made from them,
             in one commit
``rebuild``  makes projection, model and report again with the      ``rebuild`` goes on; what is
             settings in the manifest; completes the receipts and   made is kept
             removes ``pending.json``
``names``    only if names couldn't be cleaned: see below           other commands go on
===========  =====================================================  ==============================

Before ``erase`` and before ``rebuild`` nothing holds OUT, and ``after`` is called: where OUT is on
an object store, it is brought up to date there.

A tombstone doesn't tell a path. An ``erase`` that `finish` does finds its photos in the tables;
of a photo that is in no table it can't clean the log and other copies. ``pending.json`` then stays,
in the phase ``names``, until the same command comes again with its paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomona.core.errors import RequestError
from pomona.core.progress import OnTick, quiet
from pomona.core.uris import local_path
from pomona.privacy import erase
from pomona.privacy.occurrences import Tables, read_tables
from pomona.privacy.selection import first_of, read_list, select
from pomona.spark.session import Cluster
from pomona.workspace import layout, tombstones
from pomona.workspace.layout import Out

__all__ = ["ForgetOptions", "allow", "finish", "forget", "read_list"]


@dataclass(frozen=True)
class ForgetOptions:
    """How photos are forgotten; see ``pomona forget --help``."""

    listed: tuple[str, ...] = ()  # exact paths, beside the photos and patterns that are named
    rebuild: bool = True  # make again what was made from the photos
    retire: bool = False  # delete the versions in ``OUT/mlflow.db`` that were trained with them
    missing_ok: bool = False  # take exact paths that neither the tables nor the source hold
    dry_run: bool = False  # return what would go, and change nothing


def forget(
    out: str | Path,
    photos: Sequence[str] = (),
    options: ForgetOptions | None = None,
    cluster: Cluster | None = None,
    on_tick: OnTick = quiet,
    after: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Erase photos from OUT and put a tombstone in each one's place. Returns the receipt.

    ``photos`` are paths as in the table, or patterns (`pomona.privacy.selection.matcher`); with
    none at all, a forget that isn't finished is ended. ``after`` is called when the tombstones are
    written and when the photos are erased, before anything is made again; nothing holds OUT then.

    Returns
    -------
    dict
        As in ``OUT/forgotten/receipt-….json``, and ``file``, its name. With ``dry_run`` the plan.

    Raises
    ------
    RequestError
        And its kinds: a pattern matches nothing, a path is nowhere, another run is at work. Nothing
        has changed then, but for a forget that was killed, which goes on first.
    """
    options = options or ForgetOptions()
    folder = layout.open_out(out, must_exist=True)
    if not folder.table_file.exists():
        raise RequestError(f"{out} holds nothing of Pomona's: there is nothing to forget")
    begun = None
    with layout.lock(folder):
        unfinished = tombstones.pending(folder)
        if unfinished.get("phase") == erase.ERASE and not options.dry_run:  # a kill left it
            erase.erase_photos(folder, (*photos, *options.listed), on_tick)
        tables = read_tables(folder)
        paths = _to_erase(folder, tables, photos, options, unfinished)
        if options.dry_run:
            nothing = {"photos": 0, "pending": unfinished}
            return erase.plan(folder, tables, paths) if paths else nothing
        if paths:
            begun = erase.begin(folder, paths, rebuild=options.rebuild, retire=options.retire)
    after("forget")
    if begun:
        with layout.lock(folder):
            erase.refuse_other(folder, begun)
            erase.erase_photos(folder, paths, on_tick)
        after("forget")
    receipt = erase.rebuild_derived(folder, cluster, on_tick)
    if not (photos or options.listed):
        _refuse_unnamed(folder)
    return receipt


def _to_erase(
    out: Out,
    tables: Tables,
    photos: Sequence[str],
    options: ForgetOptions,
    unfinished: dict[str, Any],
) -> frozenset[str]:
    """Return the photos that are meant, or none if an unfinished forget has erased them all."""
    if not (photos or options.listed):
        if not unfinished:
            raise RequestError("forget takes photos: paths as in the table, patterns, or --list")
        return frozenset()
    under_way = unfinished.get("phase") in (erase.ERASE, erase.REBUILD)
    flags = {"missing_ok": options.missing_ok, "may_be_gone": under_way}
    paths = select(out, tables.paths, photos, options.listed, **flags)
    return frozenset() if under_way and erase.is_erased(out, tables, paths) else paths


def _refuse_unnamed(out: Out) -> None:
    if count := len(tombstones.pending(out).get("unnamed", [])):
        raise RequestError(
            f"{count} photos of a forget that was stopped are in no table, and {out.root} may "
            "still name them: run that same pomona forget again, with its paths"
        )


def finish(
    out: str | Path,
    cluster: Cluster | None = None,
    on_tick: OnTick = quiet,
    *,
    rebuild: bool = True,
) -> dict[str, Any] | None:
    """End a forget that was killed, if there is one.

    Without ``rebuild`` only its rows are erased, and None is returned.
    """
    folder = Out(local_path(str(out)))
    if not (tombstones.pending_file(folder).exists() or folder.journal.exists()):
        return None
    with layout.lock(folder):  # a journal may hold its beginning: the lock completes that
        phase = tombstones.pending(folder).get("phase")
        if phase == erase.ERASE:
            erase.erase_photos(folder, (), on_tick)
    if not rebuild or phase not in (erase.ERASE, erase.REBUILD):
        return None
    return erase.rebuild_derived(folder, cluster, on_tick)


def allow(out: str | Path, photos: Sequence[str]) -> dict[str, Any]:
    """Remove tombstones, so that the next ``extract`` takes these photos in again.

    If one of them has none, that is a RequestError, and nothing has changed.
    """
    folder = layout.open_out(out, must_exist=True)
    if not photos:
        raise RequestError("--allow takes the exact paths of forgotten photos")
    with layout.lock(folder):
        stones = tombstones.read(folder)
        if unknown := [path for path in photos if stones.id_of(path) not in stones.ids]:
            raise RequestError(
                f"{first_of(unknown)} is not forgotten in {folder.root}: --allow takes exact paths"
            )
        for name in tombstones.FILES:
            tombstones.write(folder.root / name, stones.lacking(photos))
    return {"allowed": len(photos), "tombstones": tombstones.total(folder)}
