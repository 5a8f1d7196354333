"""Make again what was made from the photos, and finish a forget."""

from __future__ import annotations

import shutil
from typing import Any

from pomona.core.errors import BusyError, JobError, MissingError, PomonaError, first_line
from pomona.core.files import read_json, write_json
from pomona.core.progress import OnTick
from pomona.core.provenance import utc_now
from pomona.pipeline.reduce import ReduceOptions, reduce
from pomona.pipeline.run import report
from pomona.pipeline.train import TrainOptions, train
from pomona.spark.session import Cluster
from pomona.workspace import feature_table, layout, tombstones
from pomona.workspace.layout import Out

REBUILD, NAMES = "rebuild", "names"


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
        _drop_record(out, stage)
        return f"no: {first_line(error)}"
    return "yes"


def _drop_record(out: Out, stage: str) -> None:
    """Remove a stage's record from the manifest: its outputs are gone, and stay so."""
    with layout.lock(out):
        manifest = read_json(out.manifest)
        manifest.get("stages", {}).pop(stage, None)
        write_json(out.manifest, manifest)


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
