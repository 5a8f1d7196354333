"""How far OUT is, and which of its stages are older than what they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pomona.core.errors import RequestError
from pomona.core.files import read_json
from pomona.workspace import feature_table, layout, tombstones
from pomona.workspace.layout import Out


def status(out: str | Path) -> dict[str, Any]:
    """Tell how far OUT is, from what lies in it; the source isn't listed again.

    Returns
    -------
    dict
        ``photos``, ``done``, ``rejected`` (by code), ``todo``, ``finished`` (stages), ``running``,
        ``forgotten`` (tombstones), ``left_out`` (of the last listing), ``forgetting`` (unfinished),
        ``unnamed`` (photos that only the same forget, with their paths, can finish).
    """
    folder = layout.open_out(out, must_exist=True)
    table = read_json(folder.table_file)
    if not table:
        raise RequestError(f"{out} holds nothing of Pomona's: pomona extract SOURCE --out {out}")
    plan = read_json(folder.work / "plan.json")
    parts = feature_table.parts_folder(folder, table["spec"])
    rows = feature_table.index(folder, parts, damaged="skip").rows
    photos = done = pc.count_distinct(rows["path"]).as_py()
    if plan:  # rows of photos that are being replaced don't count as done
        photos = plan["photos"]
        done = min(photos, plan["before"] + feature_table.count_parts(parts, plan["run"]).done)
    rejected = rows.filter(pc.is_valid(rows["error"])).group_by("error")
    codes = rejected.aggregate([("path", "count_distinct")]).to_pylist()
    stages = read_json(folder.manifest).get("stages", {})
    unfinished = {"track", *stale_stages(folder, stages), *(["extract"] if plan else [])}
    pending = tombstones.pending(folder)
    return {
        "source": table["source"],
        "photos": photos,
        "done": done,
        "rejected": {row["error"]: row["path_count_distinct"] for row in codes},
        "todo": photos - done,
        "finished": sorted(set(stages) - unfinished),
        "running": layout.is_locked(folder),
        "forgotten": tombstones.total(folder),
        "left_out": stages.get("extract", {}).get("forgotten", 0),
        "forgetting": bool(pending),
        "unnamed": len(pending.get("unnamed", [])),
    }


def stale_stages(out: Out, stages: dict[str, Any]) -> list[str]:
    """Return the stages whose results are missing or older than their inputs, in running order."""
    reduced = stages.get("reduce", {})
    if reduced.get("made_from", {}).get("features") != feature_table.digest(out):
        return ["reduce", "train"]
    inputs = stages.get("train", {}).get("made_from", {}).get("digests", {})
    changed = any(reduced["digests"].get(name) != digest for name, digest in inputs.items())
    return ["train"] if changed else []
