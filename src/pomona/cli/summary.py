"""What a run came to and how far OUT is, as text and tables of rich."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from pomona.cli.render import two_columns


def summary(records: dict[str, Any], out: str, folder: str) -> Group:
    """Return what a run did, and where its results lie.

    ``out`` is what a person knows the place by, ``folder`` where it lies on this machine.
    """
    parts: list[Any] = []
    rows: list[tuple[str, str]] = []
    if extracted := records.get("extract"):
        rows += _extract_rows(extracted)
    if reduced := records.get("reduce"):
        rows += _reduce_rows(reduced)
        parts.append(_components(reduced))
    if trained := records.get("train"):
        rows += _train_rows(trained)
        if trained.get("metrics"):
            parts.append(_figures(trained["metrics"]))
    if records.get("mlflow"):
        rows.append(("mlflow", records["mlflow"]))
    rows += _places(records, out, folder)
    return Group(*parts, two_columns(rows))


def _extract_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    splits = ", ".join(f"{n:,} {name}" for name, n in record["splits"].items())
    times = record["times"]
    settings = record["settings"]
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


def _reduce_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("variance kept", f"{record['variance_kept']:.2%} by {record['components']} components"),
        ("for 95 %", f"{record['components_for_95']} components"),
        ("compression", f"{record['compression_ratio']:.1f} : 1"),
    ]


def _train_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    if "skipped" in record:
        return [("model", f"none: {record['skipped']}")]
    unknown = record["unknown"]
    trained = f"{record['photos']:,} photos, {record['labels']:,} labels"
    return [
        ("trained on", f"{trained}, C = {record['strength']:g}"),
        ("temperature", f"{record['temperature']:.2f}"),
        ("unknown", f"by {unknown['method']}, {unknown['keep']:.0%} of known photos kept"),
    ]


FIGURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "top_3": "top-3 accuracy",
    "calibration_error": "calibration error",
}


def _figures(metrics: dict[str, Any]) -> Table:
    """Return the table of metrics: value and 95 % interval, a column for each set of photos."""
    table = Table("metric", box=None, pad_edge=False)
    for judged_on, figures in metrics.items():
        what = "Test" if judged_on == "test" else f"cross-validation by {figures['by']}"
        units = f", {figures['units']:,} groups" if figures["by"] == "group" else ""
        units += ", on which the weights were tuned" if "weights_saw" in figures else ""
        table.add_column(f"{what} ({figures['photos']:,} photos{units})")
    for name, words in FIGURES.items():
        cells = [
            f"{figures[name]['value']:.2%} "
            f"({figures[name]['low']:.1%} to {figures[name]['high']:.1%})"
            for figures in metrics.values()
        ]
        table.add_row(words, *cells)
    return table


def _components(record: dict[str, Any]) -> Table:
    table = Table("component", "variance", "cumulative", box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    total = 0.0
    for number, share in enumerate(record["first_components"][: record["components"]], 1):
        total += share
        table.add_row(str(number), f"{share:.2%}", f"{total:.2%}")
    return table


def _places(records: dict[str, Any], out: str, folder: str) -> list[tuple[str, str]]:
    rows = []
    if "extract" in records:
        rows += [("features", f"{out}/features"), ("rejected photos", f"{out}/rejected.csv")]
    if "reduce" in records:
        rows += [
            ("PCA features", f"{out}/training_pca, {out}/test_pca (CSV: …_csv)"),
            ("projection", f"{out}/projection"),
        ]
    if "digests" in records.get("train", {}):
        rows += [("model", f"{out}/model"), ("metrics", f"{out}/report/metrics.json")]
    for what, name in (("picture", "pca_variance.png"), ("report", "report.html")):
        exists = Path(folder, "report", name).exists()
        rows += [(what, f"{out}/report/{name}")] if exists else []
    return [*rows, ("manifest", f"{out}/manifest.json")]


def status(record: dict[str, Any]) -> Table:
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
        words = "not finished: run the same pomona forget again, with its paths"
        rows.append(("forget", words))
    elif record["forgetting"]:
        rows.append(("forget", "not finished: pomona forget --out OUT alone ends it"))
    return two_columns(rows)
