"""What commands came to, for people: lines, rows of names and values, and tables of rich."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomona.core.printable import escaped

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

    from pomona.model.artifact import Model
    from pomona.workspace.remote import Home

Rows = list[tuple[str, str]]  # names and values
SHOWN = 20  # paths that pomona forget --dry-run names
FIGURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "top_3": "top-3 accuracy",
    "calibration_error": "calibration error",
}


def stack(*parts: Rows | RenderableType) -> Group:
    """Return parts, one below the other; rows become a grid, folded where the terminal ends."""
    from rich.console import Group
    from rich.table import Column, Table

    def drawn(part: Rows | RenderableType) -> RenderableType:
        if not isinstance(part, list):
            return part
        grid = Table.grid(Column(), Column(overflow="fold"), padding=(0, 2))
        for row in part:
            add_row(grid, *row)
        return grid

    return Group(*map(drawn, parts))


def table(*header: str, pad_edge: bool = False) -> Table:
    """Return a table without lines, which has no rows yet."""
    from rich.table import Table

    return Table(*header, box=None, pad_edge=pad_edge)


def add_row(to: Table, *texts: str) -> None:
    """Add a row; texts may hold names of files and labels, and none acts on a terminal."""
    to.add_row(*map(escaped, texts))


def summary(records: dict[str, Any], home: Home) -> Group:
    """Return what the stages of a run did, and where their results lie."""
    parts: list[Any] = []
    rows: Rows = []
    if extracted := records.get("extract"):
        rows += _extract_rows(extracted)
    if reduced := records.get("reduce"):
        share = f"{reduced['variance_kept']:.2%}"
        rows += [
            ("variance kept", f"{share} by {reduced['components']} components"),
            ("for 95 %", f"{reduced['components_for_95']} components"),
            ("compression", f"{reduced['compression_ratio']:.1f} : 1"),
        ]
        parts.append(_components(reduced))
    if trained := records.get("train"):
        rows += _train_rows(trained)
        if trained.get("metrics"):
            parts.append(_figures(trained["metrics"]))
    if records.get("mlflow"):
        rows.append(("mlflow", records["mlflow"]))
    return stack(*parts, rows + _places(records, home))


def _extract_rows(record: dict[str, Any]) -> Rows:
    splits = ", ".join(f"{n:,} {name}" for name, n in record["splits"].items())
    times, settings = record["times"], record["settings"]
    untrained = " (untrained)" if settings["weights"].startswith("random:") else ""
    speed = f"{times['photos_per_second']:.0f} photos/s" if times["computed"] else "nothing to do"
    left = f"; {n:,} forgotten ones left out" if (n := record.get("forgotten")) else ""
    return [
        ("photos", f"{record['photos']:,} ({splits}){left}"),
        ("labels", f"{record['labels']:,}"),
        ("rejected", _codes(record["rejected"])),
        ("weights", f"{settings['weights']}{untrained}"),
        ("device", f"{settings['device']}, {settings['backend']}"),
        ("computed now", f"{times['computed']:,}, {speed}"),
    ]


def _codes(rejected: dict[str, int]) -> str:
    words = ", ".join(f"{n:,} {code}" for code, n in sorted(rejected.items()))
    return f"{sum(rejected.values()):,}" + (f" ({words})" if words else "")


def _components(record: dict[str, Any]) -> Table:
    components = table("component", "variance", "cumulative")
    for column in components.columns:
        column.justify = "right"
    total = 0.0
    for number, share in enumerate(record["first_components"][: record["components"]], 1):
        total += share
        add_row(components, str(number), f"{share:.2%}", f"{total:.2%}")
    return components


def _train_rows(record: dict[str, Any]) -> Rows:
    if "skipped" in record:
        return [("model", f"none: {record['skipped']}")]
    unknown = record["unknown"]
    trained = f"{record['photos']:,} photos, {record['labels']:,} labels"
    return [
        ("trained on", f"{trained}, C = {record['strength']:g}"),
        ("temperature", f"{record['temperature']:.2f}"),
        ("unknown", f"by {unknown['method']}, {unknown['keep']:.0%} of known photos kept"),
    ]


def _figures(metrics: dict[str, Any]) -> Table:
    """Return the table of metrics: value and 95 % interval, a column for each set of photos."""
    judged = table("metric")
    for judged_on, figures in metrics.items():
        what = "Test" if judged_on == "test" else f"cross-validation by {figures['by']}"
        units = f", {figures['units']:,} groups" if figures["by"] == "group" else ""
        units += ", on which the weights were tuned" if "weights_saw" in figures else ""
        judged.add_column(f"{what} ({figures['photos']:,} photos{units})")
    for name, words in FIGURES.items():
        intervals = (figures[name] for figures in metrics.values())
        cells = (f"{i['value']:.2%} ({i['low']:.1%} to {i['high']:.1%})" for i in intervals)
        add_row(judged, words, *cells)
    return judged


def _places(records: dict[str, Any], home: Home) -> Rows:
    out = home.name
    rows = []
    if "extract" in records:
        rows += [("features", f"{out}/features"), ("rejected photos", f"{out}/rejected.csv")]
    if "reduce" in records:
        rows.append(("PCA features", f"{out}/training_pca, {out}/test_pca (CSV: …_csv)"))
        rows.append(("projection", f"{out}/projection"))
    if "digests" in records.get("train", {}):
        rows += [("model", f"{out}/model"), ("metrics", f"{out}/report/metrics.json")]
    for what, name in (("picture", "pca_variance.png"), ("report", "report.html")):
        if Path(home.folder, "report", name).exists():
            rows.append((what, f"{out}/report/{name}"))
    return [*rows, ("manifest", f"{out}/manifest.json")]


def status(record: dict[str, Any]) -> Rows:
    """Return the rows of ``pomona status``."""
    rows = [
        ("source", record["source"]),
        ("photos", f"{record['photos']:,}"),
        ("done", f"{record['done']:,}"),
        ("rejected", _codes(record["rejected"])),
        ("to do", f"{record['todo']:,}"),
        ("finished", ", ".join(record["finished"]) or "nothing yet"),
        ("running now", "yes" if record["running"] else "no"),
    ]
    if record["forgotten"]:
        words = f"{record['forgotten']:,}, of which the last listing held {record['left_out']:,}"
        rows.append(("forgotten", words))
    if record["unnamed"]:
        rows.append(("forget", "not finished: run the same pomona forget again, with its paths"))
    elif record["forgetting"]:
        rows.append(("forget", "not finished: pomona forget --out OUT alone ends it"))
    return rows


def moved(record: dict[str, Any]) -> Rows:
    """Return the rows of ``pomona push`` and ``pomona pull``."""
    went = "uploaded" if "uploaded" in record else "downloaded"
    return [
        ("place", record["place"]),
        ("files", f"{record['files']:,}"),
        (went, f"{record[went]:,}, {record['bytes'] / 1e6:,.1f} MB"),
        ("removed", f"{record['deleted']:,}"),
    ]


def exported(record: dict[str, Any]) -> Group:
    """Return the tables of ``pomona export``: what was judged, and the files."""
    parts: list[Any] = []
    if variants := record.get("variants"):
        header = ("on held-out photos", "MB", "accuracy", "float32", "drop", "labels agree", "")
        judged = table(*header)
        for column in judged.columns[1:]:
            column.justify = "right"
        for row in variants:
            add_row(
                judged,
                row["name"],
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['accuracy']:.2%}",
                f"{row['accuracy_float32']:.2%}",
                f"{row['drop_points']:.2f}",
                f"{row['agreement']:.2%}",
                "kept" if row["kept"] else "passed" if row["passed"] else "refused",
            )
        held_out = record["held_out"]
        parts = [judged, f"judged on {held_out['photos']:,} photos of {held_out['split']}"]
    rows = [(name, f"{about['bytes'] / 1e6:.2f} MB") for name, about in record["files"].items()]
    rows.append(("folder", record["folder"]))
    if web := record.get("web"):
        rows.append(("page", f"{web['folder']}, with {web['file']}"))
    return stack(*parts, rows)


def which(model: Model) -> str:
    """Return a line that says which model it is, and how accurate."""
    from pomona.model.artifact import PACKAGED

    labels = model.labels
    named = ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")
    metrics = model.about.get("metrics", {})
    judged = metrics.get("test") or metrics.get("cross_validation") or {}
    right = ""
    if "accuracy" in judged:
        where = "Test photos" if metrics.get("test") else "photos in cross-validation"
        saw = " (its weights were tuned on them)" if judged.get("weights_saw") else ""
        share = f"{judged['accuracy']['value']:.1%}"
        right = f", right on {share} of {judged['photos']:,} {where}{saw}"
    kind = "" if model.about["weights"]["trained"] else "; its weights are untrained"
    what = "the package's model" if model.folder == PACKAGED else "model"
    return f"{what} {model.version} ({named}){right}{kind}"


def finetuned(record: dict[str, Any]) -> Rows:
    """Return the rows of ``pomona finetune``."""
    held_out, test = record["held_out"], record["test"]
    what = "groups" if held_out["by"] == "group" else "photos"
    known = "; --from or --teacher was tuned on some of them" if held_out["weights_saw"] else ""
    return [
        ("photos", f"{record['photos']:,}, {len(record['labels'])} labels"),
        ("rejected", ", ".join(f"{k}: {v}" for k, v in record["rejected"].items()) or "none"),
        (f"{what} held out", _share_right(held_out, held_out["before"]) + known),
        ("Test", _share_right(test, {}) if test else "none"),
        ("ended", f"{record['ended']}, after {held_out['step']:,} steps"),
        ("weights", "weights.safetensors: pomona run SOURCE --weights takes it"),
        ("MLflow", record["mlflow"]),
    ]


def _share_right(judged: dict[str, Any], before: dict[str, Any]) -> str:
    if "accuracy" not in judged:
        return "not judged"
    text = f"{judged['accuracy']:.1%} right, {judged['accuracy_by_group']:.1%} by group"
    return text + (f" (before: {before['accuracy']:.1%})" if before else "")


def published(record: dict[str, Any]) -> Rows:
    """Return the rows of ``pomona publish``."""
    rows = [
        ("version", f"{record['name']} {record['version']}"),
        ("aliases", ", ".join(record["aliases"]) or "none set"),
        ("signed", "yes" if record["signed"] else "no"),
        ("why", record["why"]),
    ]
    if figures := record["comparison"]:
        units = f", {figures['units']:,} groups" if figures["by"] == "group" else ""
        rows += [
            ("this model", f"{figures['accuracy']:.2%} of {figures['photos']:,} photos{units}"),
            (f"version {figures['champion']}", f"{figures['accuracy_champion']:.2%}"),
            ("p-value", f"{figures['p_value']:.3g}"),
        ]
    return [*rows, ("store", record["store"])]


def signed(record: dict[str, Any]) -> Rows:
    """Return the rows of ``pomona sign``."""
    return [("model", record["model"]), ("signature", record["signature"])]


def forget_plan(plan: dict[str, Any]) -> Rows:
    """Return the rows of ``pomona forget --dry-run``."""
    if "rows" not in plan:
        return [("forget", "one that was killed would be ended first")]
    shown = ", ".join(plan["paths"][:SHOWN])
    more = f" … and {plan['photos'] - SHOWN:,} more" if plan["photos"] > SHOWN else ""
    rows = [("photos", f"{plan['photos']:,}: {shown}{more}")]
    rows += [(f"rows of {name}", f"{count:,}") for name, count in plan["rows"].items() if count]
    rows.append(("removed, and made again if it can be", ", ".join(plan["derived"]) or "nothing"))
    return rows + _saw(plan)


def _saw(record: dict[str, Any]) -> Rows:
    """Return the rows about published models that saw the photos."""
    rows = []
    for model in record["models"]:
        sure = "" if model["trained_with"] == "yes" else "perhaps "
        aliases = f" ({', '.join(model['aliases'])})" if model["aliases"] else ""
        place = f"{model['name']} version {model['version']}{aliases} in {model['store']}"
        vectors = ": holds vectors of them" if model["holds_vector"] else ""
        deleted = "; deleted" if model["retired"] else ""
        rows.append((f"{sure}trained with them", f"{place}{vectors}{deleted}"))
    return rows + [("can't be asked", line) for line in record["out_of_reach"]]


def forgotten(receipt: dict[str, Any]) -> Rows:
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
    return [*rows, *_saw(receipt), ("receipt", receipt["file"])]


def allowed(record: dict[str, Any]) -> Rows:
    """Return the rows of ``pomona forget --allow``."""
    return [("allowed", f"{record['allowed']:,}"), ("tombstones left", f"{record['tombstones']:,}")]


def inspection(record: dict[str, Any]) -> Group:
    """Return the tables of ``pomona inspect``."""
    within, between = (f"{record['duplicates'][where]:,}" for where in ("within", "between"))
    splits = ", ".join(f"{n:,} {name}" for name, n in record["splits"].items())
    others = ", ".join(f"{n:,} {s or 'without suffix'}" for s, n in record["not_photos"].items())
    copies = f"{within} within a split, {between} Test photos that are in Training too"
    rows = [
        ("source", record["source"]),
        ("photos", f"{record['photos']:,} ({splits}), {record['bytes'] / 1e6:,.1f} MB"),
        ("labels", f"{record['labels']:,}"),
        ("pixels", ", ".join(f"{size} ({n:,})" for size, n in record["pixel_sizes"])),
        ("unrecognised", f"{record['unrecognised']:,}"),
        ("exact copies", copies),
        ("not photos", others or "none"),
        ("outside splits", f"{record['outside_splits']:,}"),
    ]
    rows += [(f"only in {s}", f"{len(names):,} labels") for s, names in record["only_in"].items()]
    if record["hint"]:
        rows.append(("hint", record["hint"]))
    sizes = table("largest", "photos", "smallest", "photos", pad_edge=True)
    for (big, many), (small, few) in zip(record["largest"], record["smallest"], strict=True):
        add_row(sizes, big, f"{many:,}", small, f"{few:,}")
    return stack(rows, sizes)
