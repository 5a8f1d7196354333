"""Erase photos: decide it, then clean copies and commit OUT without them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pomona.core.errors import BusyError
from pomona.core.files import FORMAT, read_json, write_json
from pomona.core.progress import OnTick, Tick
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
from pomona.privacy.rebuild import REBUILD
from pomona.privacy.receipt import open_receipt
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
    """Erase photos, and all photos in the tables that have a tombstone.

    Killed before the commit, it is done again from its start; the tombstones tell the rows, but
    names of photos that are in no table are known from ``paths`` alone.
    """
    on_tick(Tick("forget", 0, 3))
    pending, stones, tables = tombstones.pending(out), tombstones.read(out), read_tables(out)
    in_tables = tables.paths.filter(stones.held(tables.paths)).to_pylist()
    occurrences = locate(out, tables, frozenset(paths).union(in_tables))
    trained = lineage_of(out, occurrences)
    models, out_of_reach = lineage.versions(out, trained)
    if pending["retire"]:
        lineage.retire(out, models)
    on_tick(Tick("forget", 1, 3))
    cleaned = copies.clean(out, occurrences, lambda model: trained.saw(model) is not None)
    on_tick(Tick("forget", 2, 3))
    change = staging.Change(out, out.work / f"forget-{feature_table.new_run()}")
    staging.stage(out, occurrences, change, drop_records=not pending["rebuild"])
    receipt = open_receipt(out, pending, occurrences, change.counts, cleaned)
    receipt |= {"models": models, "out_of_reach": out_of_reach}
    write_json(change.put(f"forgotten/{pending['receipt']}"), receipt)
    pending = _erased(out, pending, stones, occurrences)
    write_json(change.put("forgotten/pending.json"), pending)
    layout.commit(out, change.moves)
    on_tick(Tick("forget", 3, 3))


def _erased(
    out: Out, pending: dict[str, Any], stones: Tombstones, occurrences: Occurrences
) -> dict[str, Any]:
    """Return ``pending.json`` as it is once the photos are erased: what is to be made again."""
    todo = set(pending["todo"])
    if occurrences.in_derived and pending["rebuild"]:
        todo |= {"reduce", "train"} & read_json(out.manifest).get("stages", {}).keys()
        if (out.report / "report.html").exists():
            todo.add("report")
    unnamed = {*pending["ids"], *pending.get("unnamed", [])} - _ids(stones, occurrences.paths)
    return {
        **pending,
        "phase": REBUILD,
        "todo": [stage for stage in ("reduce", "train", "report") if stage in todo],
        "unnamed": sorted(unnamed),
    }


def is_erased(out: Out, tables: Tables, paths: frozenset[str]) -> bool:
    """Tell whether all of some photos are erased, rows and names: the same command after a kill."""
    stones, pending = tombstones.read(out), tombstones.pending(out)
    if any(stones.id_of(path) not in stones.ids for path in paths):
        return False
    if _ids(stones, paths).intersection(pending.get("unnamed", [])):
        return False
    return not pc.any(pc.is_in(tables.paths, pa.array(sorted(paths), pa.string()))).as_py()


def _ids(stones: Tombstones, paths: Iterable[str]) -> set[str]:
    return {stones.id_of(path).hex() for path in paths}
