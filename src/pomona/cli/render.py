"""Records of commands as text and tables of rich; a run's are in `pomona.cli.summary`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Column, Table

if TYPE_CHECKING:
    from pomona.model.artifact import Model


SHOWN = 20
"""Paths that ``pomona forget --dry-run`` names."""


def two_columns(rows: list[tuple[str, str]]) -> Table:
    """Return a table of names and values, which are folded where the terminal ends."""
    table = Table.grid(Column(), Column(overflow="fold"), padding=(0, 2))
    for name, value in rows:
        table.add_row(name, value)
    return table


def moved(record: dict[str, Any]) -> Table:
    """Return the rows of ``pomona push`` and ``pomona pull``."""
    went = "uploaded" if "uploaded" in record else "downloaded"
    return two_columns(
        [
            ("place", record["place"]),
            ("files", f"{record['files']:,}"),
            (went, f"{record[went]:,}, {record['bytes'] / 1e6:,.1f} MB"),
            ("removed", f"{record['deleted']:,}"),
        ]
    )


def exported(record: dict[str, Any]) -> Group:
    """Return the tables of ``pomona export``: what was judged, and the files."""
    parts: list[Any] = []
    if variants := record.get("variants"):
        judges = record["held_out"]
        table = Table("on held-out photos", box=None, pad_edge=False)
        for column in ("MB", "accuracy", "float32", "drop", "labels agree", ""):
            table.add_column(column, justify="right")
        for row in variants:
            table.add_row(
                row["name"],
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['accuracy']:.2%}",
                f"{row['accuracy_float32']:.2%}",
                f"{row['drop_points']:.2f}",
                f"{row['agreement']:.2%}",
                "kept" if row["kept"] else "passed" if row["passed"] else "refused",
            )
        parts.append(table)
        parts.append(f"judged on {judges['photos']:,} photos of {judges['split']}")
    files = [(name, f"{about['bytes'] / 1e6:.2f} MB") for name, about in record["files"].items()]
    places = [("folder", record["folder"])]
    if web := record.get("web"):
        places.append(("page", f"{web['folder']}, with {web['file']}"))
    return Group(*parts, two_columns([*files, *places]))


def served(model: Model, address: str) -> str:
    """Return the lines of ``pomona serve`` when it answers."""
    return (
        f"pomona: {which(model)}\npomona: {address} answers; the page is there too. Ctrl-C ends it."
    )


def which(model: Model) -> str:
    """Return a line that says which model it is, and how accurate."""
    from pomona.model.artifact import PACKAGED

    labels = model.labels
    named = ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")
    metrics = model.about.get("metrics", {})
    judged = metrics.get("test") or metrics.get("cross_validation") or {}
    right = f", right on {judged['accuracy']['value']:.1%}" if "accuracy" in judged else ""
    on = ""
    if right:
        where = "Test photos" if metrics.get("test") else "photos in cross-validation"
        saw = " (its weights were tuned on them)" if judged.get("weights_saw") else ""
        on = f" of {judged['photos']:,} {where}{saw}"
    kind = "" if model.about["weights"]["trained"] else "; its weights are untrained"
    what = "the package's model" if model.folder == PACKAGED else "model"
    return f"{what} {model.version} ({named}){right}{on}{kind}"


def finetuned(record: dict[str, Any]) -> Table:
    """Return the rows of ``pomona finetune``."""
    held_out, test = record["held_out"], record["test"]
    what = "groups" if held_out["by"] == "group" else "photos"
    known = "; --from or --teacher was tuned on some of them" if held_out["weights_saw"] else ""
    rows = [
        ("photos", f"{record['photos']:,}, {len(record['labels'])} labels"),
        ("rejected", ", ".join(f"{k}: {v}" for k, v in record["rejected"].items()) or "none"),
        (f"{what} held out", _share_right(held_out, held_out["before"]) + known),
        ("Test", _share_right(test, {}) if test else "none"),
        ("ended", f"{record['ended']}, after {held_out['step']:,} steps"),
        ("weights", "weights.safetensors: pomona run SOURCE --weights takes it"),
        ("MLflow", record["mlflow"]),
    ]
    return two_columns(rows)


def _share_right(judged: dict[str, Any], before: dict[str, Any]) -> str:
    if "accuracy" not in judged:
        return "not judged"
    text = f"{judged['accuracy']:.1%} right, {judged['accuracy_by_group']:.1%} by group"
    return text + (f" (before: {before['accuracy']:.1%})" if before else "")


def published(record: dict[str, Any]) -> Table:
    """Return the rows of ``pomona publish``."""
    rows = [
        ("version", f"{record['name']} {record['version']}"),
        ("aliases", ", ".join(record["aliases"]) or "none set"),
        ("why", record["why"]),
    ]
    if figures := record["comparison"]:
        units = f", {figures['units']:,} groups" if figures["by"] == "group" else ""
        rows += [
            ("this model", f"{figures['accuracy']:.2%} of {figures['photos']:,} photos{units}"),
            (f"version {figures['champion']}", f"{figures['accuracy_champion']:.2%}"),
            ("p-value", f"{figures['p_value']:.3g}"),
        ]
    return two_columns([*rows, ("store", record["store"])])


def forget_plan(plan: dict[str, Any]) -> Table:
    """Return the rows of ``pomona forget --dry-run``."""
    if "rows" not in plan:
        return two_columns([("forget", "one that was killed would be ended first")])
    shown = plan["paths"][:SHOWN]
    more = f" … and {plan['photos'] - SHOWN:,} more" if plan["photos"] > SHOWN else ""
    rows = [("photos", f"{plan['photos']:,}: {', '.join(shown)}{more}")]
    rows += [(f"rows of {name}", f"{count:,}") for name, count in plan["rows"].items() if count]
    rows.append(("removed, and made again if it can be", ", ".join(plan["derived"]) or "nothing"))
    return two_columns([*rows, *_saw(plan)])


def _saw(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows about published models that saw the photos."""
    rows = [
        (
            "trained with them" if one["trained_with"] == "yes" else "perhaps trained with them",
            f"{one['name']} version {one['version']}"
            f"{' (' + ', '.join(one['aliases']) + ')' if one['aliases'] else ''} in {one['store']}"
            f"{': holds vectors of them' if one['holds_vector'] else ''}"
            f"{'; deleted' if one['retired'] else ''}",
        )
        for one in record["models"]
    ]
    return [*rows, *(("can't be asked", line) for line in record["out_of_reach"])]


def forgotten(receipt: dict[str, Any]) -> Table:
    """Return the rows of ``pomona forget``."""
    rows = [("photos", f"{receipt['photos']:,} ({receipt['tombstones_added']:,} new tombstones)")]
    rows += [(f"rows of {name}", f"{n:,}") for name, n in receipt["rows"].items() if n]
    copies = receipt["copies"]
    words = {
        "log_lines": "lines of the log",
        "values": "values in MLflow's database",
        "removed": "files of MLflow's runs removed",
        "rewritten": "files of MLflow's runs cleaned",
        "answers": "answers",
    }
    rows += [(text, f"{copies[name]:,}") for name, text in words.items() if copies[name]]
    rows += [("made again: " + name, result) for name, result in receipt["made_again"].items()]
    if receipt["export_removed"]:
        rows.append(("export", "removed: pomona export --out OUT makes it again"))
    rows += [("still names a photo", name) for name in copies["left"]]
    return two_columns([*rows, *_saw(receipt), ("receipt", receipt["file"])])


def allowed(record: dict[str, Any]) -> Table:
    """Return the rows of ``pomona forget --allow``."""
    return two_columns(
        [("allowed", f"{record['allowed']:,}"), ("tombstones left", f"{record['tombstones']:,}")]
    )


def inspection(record: dict[str, Any]) -> Group:
    """Return the tables of ``pomona inspect``."""
    duplicates = record["duplicates"]
    splits = ", ".join(f"{n:,} {name}" for name, n in record["splits"].items())
    others = ", ".join(f"{n:,} {s or 'without suffix'}" for s, n in record["not_photos"].items())
    rows = [
        ("source", record["source"]),
        ("photos", f"{record['photos']:,} ({splits}), {record['bytes'] / 1e6:,.1f} MB"),
        ("labels", f"{record['labels']:,}"),
        ("pixels", ", ".join(f"{size} ({n:,})" for size, n in record["pixel_sizes"])),
        ("unrecognised", f"{record['unrecognised']:,}"),
        (
            "exact copies",
            f"{duplicates['within']:,} within a split, {duplicates['between']:,} "
            "Test photos that are in Training too",
        ),
        ("not photos", others or "none"),
        ("outside splits", f"{record['outside_splits']:,}"),
    ]
    for split, labels in record["only_in"].items():
        rows.append((f"only in {split}", f"{len(labels):,} labels"))
    if record["hint"]:
        rows.append(("hint", record["hint"]))
    labels = Table("largest", "photos", "smallest", "photos", box=None)
    for (big, many), (small, few) in zip(record["largest"], record["smallest"], strict=True):
        labels.add_row(big, f"{many:,}", small, f"{few:,}")
    return Group(two_columns(rows), labels)


# --- the cloud ---------------------------------------------------------------------------------


def cloud_state(record: dict[str, Any]) -> str:
    """Return one line: a job's state and, once it is over, how long it took.

    >>> cloud_state({"job": "00f1", "state": "SUCCESS", "ok": True, "seconds": 3723})
    '00f1 SUCCESS after 1:02:03'
    """
    took = f" after {_duration(record['seconds'])}" if record["ok"] is not None else ""
    return f"{record['job']} {record['state']}{took}"


def _duration(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def cloud_job(record: dict[str, Any]) -> Table:
    """Return the rows of ``pomona cloud emr submit`` and ``status JOB``."""
    names = ("job", "state", "why", "started")
    rows = [(name, str(record[name])) for name in names if record[name]]
    if record["seconds"]:
        rows.append(("took", _duration(record["seconds"])))
    rows += [(name, f"{used:.3f}") for name, used in (record["billed"] or {}).items()]
    if "command" in record:
        rows.append(("command", f"pomona {' '.join(record['command'])}"))
    return two_columns(rows)


def cloud_jobs(record: dict[str, Any]) -> Table | str:
    """Return the table of ``pomona cloud emr status``."""
    if not record["jobs"]:
        return f"{record['stack']} ({record['mode']}) has no jobs yet"
    table = Table("job", "state", "started", "took", box=None, pad_edge=False)
    for job in record["jobs"]:
        table.add_row(job["job"], job["state"], job["started"] or "", _duration(job["seconds"]))
    return table


def cloud_holdings(held: dict[str, Any]) -> str:
    """Return lines that say what ``pomona cloud emr teardown`` is about to delete."""
    lines = [f"the stack {held['stack']} in {held['region']}, with"]
    if held["compute"]:
        lines.append(f"  {held['compute']}, where {len(held['jobs'])} jobs are not over")
    lines += [f"  s3://{name}, {count:,} objects" for name, count in held["objects"].items()]
    return "\n".join(lines)
