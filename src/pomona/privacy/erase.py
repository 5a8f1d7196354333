"""Erase photos: decide it, then clean copies and commit OUT without them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import pyarrow as pa

from pomona import __version__
from pomona.core.errors import BusyError
from pomona.core.files import FORMAT, read_json, write_json
from pomona.core.progress import OnTick, Tick
from pomona.core.provenance import utc_now
from pomona.privacy import copies, staging
from pomona.privacy.occurrences import (
    DERIVED,
    REPORT_FILES,
    Occurrences,
    Tables,
    lineage_of,
    locate,
    read_tables,
)
from pomona.privacy.rebuild import REBUILD, digests
from pomona.registry import lineage
from pomona.workspace import feature_table, layout, tombstones
from pomona.workspace.layout import Out
from pomona.workspace.tombstones import Tombstones

ERASE = "erase"


def plan(out: Out, tables: Tables, paths: frozenset[str]) -> dict[str, Any]:
    """Return what would go, for a person to decide on. Nothing is written."""
    occurrences = locate(out, tables, paths)
    derived = [name for name in (*DERIVED, "export") if (out.root / name).exists()]
    derived += [f"report/{name}" for name in REPORT_FILES if (out.report / name).exists()]
    models, out_of_reach = lineage.versions(out, lineage_of(out, occurrences))
    return {
        "photos": len(paths),
        "paths": sorted(paths),
        "rows": occurrences.counts,
        "derived": derived if occurrences.in_derived else [],
        "models": models,
        "out_of_reach": out_of_reach,
    }


def begin(out: Out, paths: frozenset[str], *, rebuild: bool, retire: bool) -> dict[str, Any]:
    """Write the tombstones and ``pending.json``, which is returned: from here on it is decided.

    Both or neither are written: a tombstone alone would let extract drop the row and leave the
    copies. What an earlier forget hasn't finished is carried on.
    """
    unfinished = tombstones.pending(out)
    old = tombstones.read(out)
    new = old.having(paths)
    receipt = f"receipt-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{feature_table.new_run()}.json"
    pending = {
        "format": FORMAT,
        "phase": ERASE,
        "rebuild": rebuild,
        "retire": retire,
        "ids": sorted(_ids(new, paths)),
        "added": len(new.ids) - len(old.ids),
        "receipt": receipt,
        "receipts": [*unfinished.get("receipts", []), receipt],
        "unnamed": unfinished.get("unnamed", []),
        "todo": unfinished.get("todo", []),
        "plots": unfinished.get("plots", False) or (out.report / "pca_variance.png").exists(),
    }
    change = staging.Change(out, out.work / f"begin-{feature_table.new_run()}")
    tombstones.write(change.put("forgotten/tombstones.json"), new)
    write_json(change.put("forgotten/pending.json"), pending)
    layout.commit(out, change.moves)
    return pending


def refuse_other(out: Out, begun: dict[str, Any]) -> None:
    """Check that this forget is still the one to be erased: nothing held OUT for a while.

    Raises
    ------
    BusyError
        If another command went on with it.
    """
    pending = tombstones.pending(out)
    if (pending.get("receipt"), pending.get("phase")) != (begun["receipt"], ERASE):
        raise BusyError(f"another pomona command is at work on {out.root}: run the same again")


def erase_photos(out: Out, paths: Iterable[str], on_tick: OnTick) -> None:
    """Erase the photos that have a tombstone: all in the tables, and those among ``paths``.

    Killed before the commit, it is done again from its start; the tombstones tell the rows, but
    names of photos that are in no table are known from ``paths`` alone.
    """
    on_tick(Tick("forget", 0, 3))
    pending, stones, tables = tombstones.pending(out), tombstones.read(out), read_tables(out)
    known = pa.array({*paths, *tables.paths.to_pylist()}, pa.string())
    occurrences = locate(out, tables, frozenset(known.filter(stones.held(known)).to_pylist()))
    trained = lineage_of(out, occurrences)
    models, out_of_reach = lineage.versions(out, trained)
    if pending["retire"]:
        lineage.retire(out, models)
    on_tick(Tick("forget", 1, 3))
    cleaned = copies.clean(out, occurrences, lambda model: trained.saw(model) is not None)
    on_tick(Tick("forget", 2, 3))
    elsewhere = {"models": models, "out_of_reach": out_of_reach, "copies": asdict(cleaned)}
    _commit(out, pending, stones, occurrences, elsewhere)
    on_tick(Tick("forget", 3, 3))


def _commit(
    out: Out,
    pending: dict[str, Any],
    stones: Tombstones,
    occurrences: Occurrences,
    elsewhere: dict[str, Any],
) -> None:
    """Put OUT without the photos in place, with the receipt and the next phase's ``pending.json``.

    ``elsewhere`` is what the receipt says of published models and of copies.
    """
    change = staging.Change(out, out.work / f"forget-{feature_table.new_run()}")
    staging.stage(out, occurrences, change, drop_records=not pending["rebuild"])
    receipt = {
        "format": FORMAT,
        "pomona": __version__,
        "finished": None,
        "erased": utc_now(),
        "photos": len(pending["ids"]),
        "tombstones": pending["ids"],
        "tombstones_added": pending["added"],
        "rows": occurrences.counts,
        "files": dict(change.counts),
        "made_again": {},
        "export_removed": occurrences.in_derived and (out.root / "export").exists(),
        "digests": {"before": digests(out)},
        **elsewhere,
    }
    write_json(change.put(f"forgotten/{pending['receipt']}"), receipt)
    unnamed = {*pending["ids"], *pending.get("unnamed", [])} - _ids(stones, occurrences.paths)
    todo = _to_make_again(out, pending, occurrences)
    pending = {**pending, "phase": REBUILD, "todo": todo, "unnamed": sorted(unnamed)}
    write_json(change.put("forgotten/pending.json"), pending)
    layout.commit(out, change.moves)


def _to_make_again(out: Out, pending: dict[str, Any], occurrences: Occurrences) -> list[str]:
    """Return the stages that had been done with the photos, and what an earlier forget owes."""
    todo = set(pending["todo"])
    if occurrences.in_derived and pending["rebuild"]:
        todo |= {"reduce", "train"} & read_json(out.manifest).get("stages", {}).keys()
        if (out.report / "report.html").exists():
            todo.add("report")
    return [stage for stage in ("reduce", "train", "report") if stage in todo]


def is_erased(out: Out, tables: Tables, paths: frozenset[str]) -> bool:
    """Tell whether all of some photos are erased, rows and names: the same command after a kill."""
    if paths.intersection(tables.paths.to_pylist()):
        return False
    stones = tombstones.read(out)
    unnamed = tombstones.pending(out).get("unnamed", [])
    ids = _ids(stones, paths)
    return ids.issubset(stone.hex() for stone in stones.ids) and ids.isdisjoint(unnamed)


def _ids(stones: Tombstones, paths: Iterable[str]) -> set[str]:
    return {stones.id_of(path).hex() for path in paths}
