"""The phases of a forget: decide it, erase the photos, and make again what was made from them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import pyarrow as pa

from pomona import __version__
from pomona.core.errors import BusyError, JobError, MissingError, PomonaError, first_line
from pomona.core.files import FORMAT, read_json, write_json
from pomona.core.progress import OnTick, Tick
from pomona.core.provenance import utc_now
from pomona.pipeline.reduce import ReduceOptions, reduce
from pomona.pipeline.run import report
from pomona.pipeline.train import TrainOptions, train
from pomona.privacy import copies, staging
from pomona.privacy.occurrences import REMOVED, Occurrences, Tables, lineage_of, locate, read_tables
from pomona.registry import lineage
from pomona.spark.session import Cluster
from pomona.workspace import feature_table, layout, tombstones
from pomona.workspace.layout import Out
from pomona.workspace.tombstones import Tombstones

ERASE, REBUILD, NAMES = "erase", "rebuild", "names"  # the phases that ``pending.json`` tells


def plan(out: Out, tables: Tables, paths: frozenset[str]) -> dict[str, Any]:
    """Return what would go, for a person to decide on. Nothing is written."""
    occurrences = locate(out, tables, paths)
    derived = [name for name in REMOVED if (out.root / name).exists()]
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
    for name in tombstones.FILES:
        tombstones.write(change.put(name), new)
    write_json(change.put("forgotten/pending.json"), pending)
    layout.commit(out, change.moves)
    return pending


def refuse_other(out: Out, begun: dict[str, Any]) -> None:
    """Raise BusyError if another command went on with this forget: nothing held OUT for a while."""
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
    _commit(out, occurrences, elsewhere)
    on_tick(Tick("forget", 3, 3))


def _commit(out: Out, occurrences: Occurrences, elsewhere: dict[str, Any]) -> None:
    """Put OUT without the photos in place, with the receipt and the next phase's ``pending.json``.

    ``elsewhere`` is what the receipt says of published models and of copies.
    """
    pending = tombstones.pending(out)
    change = staging.Change(out, out.work / f"forget-{feature_table.new_run()}")
    staging.stage(occurrences, change, drop_records=not pending["rebuild"])
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
    cleaned = _ids(tombstones.read(out), occurrences.paths)
    unnamed = {*pending["ids"], *pending.get("unnamed", [])} - cleaned
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


def rebuild_derived(out: Out, cluster: Cluster | None, on_tick: OnTick) -> dict[str, Any]:
    """Make again what had been made, and complete the receipts. Returns the last receipt.

    A receipt isn't complete, and ``pending.json`` stays, while a photo's names aren't cleaned.
    """
    pending = tombstones.pending(out)
    made_again = {
        stage: _make_again(out, stage, pending["plots"], cluster, on_tick)
        for stage in pending["todo"]
    }
    with layout.lock(out):
        stones = {stone.hex() for stone in tombstones.read(out).ids}
        unnamed = stones.intersection(pending.get("unnamed", []))
        names = pending["receipts"]
        still_open = [name for name in names if not _complete(out, name, made_again, unnamed)]
        if unnamed:
            kept = {"phase": NAMES, "todo": [], "unnamed": sorted(unnamed), "receipts": still_open}
            write_json(tombstones.pending_file(out), {**pending, **kept})
        else:
            tombstones.pending_file(out).unlink()
        for staged in (*out.work.glob("begin-*"), *out.work.glob("forget-*")):
            shutil.rmtree(staged)  # of a forget that was killed
        if out.work.is_dir() and not any(out.work.iterdir()):
            out.work.rmdir()
    receipt = read_json(out.forgotten / pending["receipt"])
    return {**receipt, "file": f"forgotten/{pending['receipt']}"}


def _make_again(out: Out, stage: str, plots: bool, cluster: Cluster | None, on_tick: OnTick) -> str:
    """Make one stage's outputs again. Returns ``yes``, or why it can't be; then its record goes."""
    if (out.work / "plan.json").exists():
        return "no: extract isn't finished"
    records = read_json(out.manifest).get("stages", {})
    record = records.get("reduce" if stage == "report" else stage)
    if record is None:
        return "no: what it is made from is not there"
    try:
        if stage == "reduce":
            options = ReduceOptions(**record["made_from"]["settings"], plots=plots)
            reduce(out.root, options, cluster, on_tick)
        elif stage == "train":
            train(out.root, TrainOptions(**record["made_from"]["settings"]), on_tick)
        elif not (out.report / "report.html").exists():
            report(out.root, on_tick)
    except (BusyError, MissingError, JobError) as error:
        raise type(error)(
            f"the photos are erased, but {stage} isn't made again yet ({error}): pomona forget "
            "--out … alone goes on"
        ) from error
    except PomonaError as error:
        with layout.lock(out):  # its outputs are gone, and stay so
            manifest = read_json(out.manifest)
            manifest.get("stages", {}).pop(stage, None)
            write_json(out.manifest, manifest)
        return f"no: {first_line(error)}"
    return "yes"


def _complete(out: Out, name: str, made_again: dict[str, str], unnamed: set[str]) -> bool:
    """Complete a receipt, unless one of its photos is unnamed. Returns whether it is complete."""
    receipt = read_json(out.forgotten / name)
    if not receipt:  # somebody removed it
        return True
    is_complete = unnamed.isdisjoint(receipt["tombstones"])
    receipt["made_again"] |= made_again
    receipt["digests"]["after"] = digests(out)
    if is_complete:
        receipt["finished"] = utc_now()
    write_json(out.forgotten / name, receipt)
    return is_complete


def digests(out: Out) -> dict[str, str]:
    """Return the digests of the tables, the projection and the model."""
    stages = read_json(out.manifest).get("stages", {})
    reduced, trained = (stages.get(name, {}).get("digests", {}) for name in ("reduce", "train"))
    return {"features": feature_table.digest(out), **reduced, **trained}
