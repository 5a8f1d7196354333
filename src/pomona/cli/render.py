"""What a person sees: progress, summaries and tables. Returns text or rich renderables."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column, Table

if TYPE_CHECKING:
    from pomona.model.artifact import Model

WORDS = {
    "list": "listing photos",
    "weights": "fetching weights (bytes)",
    "spark": "starting Spark",
    "extract": "extracting features",
    "table": "writing the table",
    "reduce": "reducing",
    "train": "training",
    "report": "writing the report",
    "predict": "answering",
    "decode": "decoding photos",
    "finetune": "training (photos)",
    "export": "exporting",
    "publish": "publishing",
    "forget": "forgetting",
    "synthesize": "rendering",
    "push": "pushing (bytes)",
    "pull": "pulling (bytes)",
    "lock": "waiting whether another run is alive (seconds)",
    "inspect": "looking at photos",
}
TIMED = ("extract", "synthesize", "inspect", "predict", "decode", "finetune")
"""Stages whose time left is told."""
LINE_EVERY = 5.0
"""Seconds between lines where there is no terminal."""


class Rate:
    """Things per second and time left, over the last minute."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []

    def add(self, done: int, now: float) -> None:
        """Note how many are done."""
        if not self.seen or done != self.seen[-1][1]:
            self.seen.append((now, done))
        while len(self.seen) > 2 and now - self.seen[0][0] > 60:
            self.seen.pop(0)

    def per_second(self) -> float:
        """Return the rate; 0 while it isn't known."""
        (first, a), (last, b) = (self.seen[0], self.seen[-1]) if self.seen else ((0, 0), (0, 0))
        return (b - a) / (last - first) if last > first else 0.0


def describe(tick: Any, per_second: float) -> str:
    """Return the numbers of a tick as words: rate, time left, rejected.

    >>> from types import SimpleNamespace as T
    >>> describe(T(stage="extract", done=300, total=900, rejected=2), 100.0)
    '100/s, 0:06 left, 2 rejected'
    """
    words = []
    if per_second and tick.stage in TIMED:
        left = int((tick.total - tick.done) / per_second)
        words.append(f"{per_second:.0f}/s")
        words.append(
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
            if left >= 3600
            else f"{left // 60}:{left % 60:02} left"
        )
    if tick.rejected:
        words.append(f"{tick.rejected:,} rejected")
    return ", ".join(words)


@contextlib.contextmanager
def progress(stream: IO[str]) -> Iterator[Callable[[Any], None]]:
    """Give a function that shows ticks: a bar on a terminal, elsewhere a line every few seconds."""
    if not stream.isatty():
        # Of a notebook, rich would show each line as HTML; the stream is what was asked for.
        yield _lines(Console(file=stream, force_jupyter=False))
        return
    # While Spark starts, the process's own output goes to the log: the bar needs a way of its own.
    console = Console(file=os.fdopen(os.dup(stream.fileno()), "w", encoding="utf-8"))
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        yield _bars(bars)


def _bars(bars: Progress) -> Callable[[Any], None]:
    shown: dict[str, Any] = {}
    rates: dict[str, Rate] = {}

    def on_tick(tick: Any) -> None:
        if tick.stage not in shown:
            for task in shown.values():
                bars.update(task, visible=False)
            shown[tick.stage] = bars.add_task(WORDS[tick.stage], total=None, note="")
        rate = rates.setdefault(tick.stage, Rate())
        rate.add(tick.done, time.monotonic())
        note = describe(tick, rate.per_second())
        bars.update(shown[tick.stage], completed=tick.done, total=tick.total or None, note=note)

    return on_tick


def _lines(console: Console) -> Callable[[Any], None]:
    state: dict[str, Any] = {"stage": "", "at": 0.0}
    rates: dict[str, Rate] = {}

    def on_tick(tick: Any) -> None:
        now = time.monotonic()
        rate = rates.setdefault(tick.stage, Rate())
        rate.add(tick.done, now)
        ended = bool(tick.total) and tick.done == tick.total and state.get("last") != tick.done
        if tick.stage == state["stage"] and now - state["at"] < LINE_EVERY and not ended:
            return
        state.update(stage=tick.stage, at=now, last=tick.done)
        count = f" {tick.done:,}" + (f" of {tick.total:,}" if tick.total else "")
        note = describe(tick, rate.per_second())
        line = f"{WORDS[tick.stage]}:{count if tick.done or tick.total else ''}"
        console.print(f"{line}{', ' + note if note else ''}", markup=False, highlight=False)

    return on_tick


# --- summaries ---------------------------------------------------------------------------------


def summary(records: dict[str, Any], out: str, folder: str) -> Group:
    """Return what a run did, and where its results lie: OUT, in this folder of the machine."""
    parts: list[Any] = []
    rows: list[tuple[str, str]] = []
    if first := records.get("extract"):
        rows += _extract_rows(first)
    if second := records.get("reduce"):
        rows += _reduce_rows(second)
        parts.append(_components(second))
    if third := records.get("train"):
        rows += _train_rows(third)
        if third.get("metrics"):
            parts.append(_figures(third["metrics"]))
    if records.get("mlflow"):
        rows.append(("mlflow", records["mlflow"]))
    rows += _places(records, out, folder)
    return Group(*parts, _two_columns(rows))


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


def _codes(codes: dict[str, int]) -> str:
    words = ", ".join(f"{n:,} {code}" for code, n in sorted(codes.items()))
    return f"{sum(codes.values()):,}" + (f" ({words})" if words else "")


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
    """Return the table of metrics: value and 95 % interval, by what they were measured on."""
    table = Table("metric", box=None, pad_edge=False)
    for part, figures in metrics.items():
        what = "Test" if part == "test" else f"cross-validation by {figures['by']}"
        units = f", {figures['units']:,} groups" if figures["by"] == "group" else ""
        units += ", on which the weights were tuned" if "weights_saw" in figures else ""
        table.add_column(f"{what} ({figures['photos']:,} photos{units})")
    for name, words in FIGURES.items():
        cells = [
            f"{f[name]['value']:.2%} ({f[name]['low']:.1%} to {f[name]['high']:.1%})"
            for f in metrics.values()
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


def _two_columns(rows: list[tuple[str, str]]) -> Table:
    table = Table.grid(Column(), Column(overflow="fold"), padding=(0, 2))
    for name, value in rows:
        table.add_row(name, value)
    return table


def moved(record: dict[str, Any]) -> Table:
    """Return the rows of ``pomona push`` and ``pomona pull``."""
    went = "uploaded" if "uploaded" in record else "downloaded"
    return _two_columns(
        [
            ("place", record["place"]),
            ("files", f"{record['files']:,}"),
            (went, f"{record[went]:,}, {record['bytes'] / 1e6:,.1f} MB"),
            ("removed", f"{record['deleted']:,}"),
        ]
    )


def status(found: dict[str, Any]) -> Table:
    """Return the rows of ``pomona status``."""
    rows = [
        ("source", found["source"]),
        ("photos", f"{found['photos']:,}"),
        ("done", f"{found['done']:,}"),
        ("rejected", _codes(found["rejected"])),
        ("to do", f"{found['todo']:,}"),
        ("finished", ", ".join(found["finished"]) or "nothing yet"),
        ("running now", "yes" if found["running"] else "no"),
    ]
    if found["forgotten"]:
        words = f"{found['forgotten']:,}, of which the last listing held {found['left_out']:,}"
        rows.append(("forgotten", words))
    if found["unnamed"]:
        words = "not finished: run the same pomona forget again, with its paths"
        rows.append(("forget", words))
    elif found["forgetting"]:
        rows.append(("forget", "not finished: pomona forget --out OUT alone ends it"))
    return _two_columns(rows)


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
    return Group(*parts, _two_columns([*files, *places]))


def served(found: Model, address: str) -> str:
    """Return the lines of ``pomona serve`` when it answers."""
    return (
        f"pomona: {which(found)}\npomona: {address} answers; the page is there too. Ctrl-C ends it."
    )


def which(found: Model) -> str:
    """Return a line that tells which model it is, and how good."""
    from pomona.model.artifact import PACKAGED

    labels = found.labels
    named = ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")
    metrics = found.about.get("metrics", {})
    judged = metrics.get("test") or metrics.get("cross_validation") or {}
    right = f", right on {judged['accuracy']['value']:.1%}" if "accuracy" in judged else ""
    on = ""
    if right:
        where = "Test photos" if metrics.get("test") else "photos in cross-validation"
        saw = " (its weights were tuned on them)" if judged.get("weights_saw") else ""
        on = f" of {judged['photos']:,} {where}{saw}"
    kind = "" if found.about["weights"]["trained"] else "; its weights are untrained"
    what = "the package's model" if found.folder == PACKAGED else "model"
    return f"{what} {found.version} ({named}){right}{on}{kind}"


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
    return _two_columns(rows)


def _share_right(found: dict[str, Any], before: dict[str, Any]) -> str:
    if "accuracy" not in found:
        return "not judged"
    text = f"{found['accuracy']:.1%} right, {found['accuracy_by_group']:.1%} by group"
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
    return _two_columns([*rows, ("store", record["store"])])


def forget_plan(plan: dict[str, Any]) -> Table:
    """Return the rows of ``pomona forget --dry-run``."""
    if "rows" not in plan:
        return _two_columns([("forget", "one that was killed would be ended first")])
    shown = plan["paths"][:SHOWN]
    more = f" … and {plan['photos'] - SHOWN:,} more" if plan["photos"] > SHOWN else ""
    rows = [("photos", f"{plan['photos']:,}: {', '.join(shown)}{more}")]
    rows += [(f"rows of {name}", f"{count:,}") for name, count in plan["rows"].items() if count]
    rows.append(("removed, and made again if it can be", ", ".join(plan["derived"]) or "nothing"))
    return _two_columns([*rows, *_saw(plan)])


SHOWN = 20


def _saw(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows about published models."""
    rows = [
        (
            "trained with them" if one["trained_with"] == "yes" else "perhaps trained with them",
            f"{one['name']} version {one['version']}"
            f"{' (' + ', '.join(one['aliases']) + ')' if one['aliases'] else ''} in {one['store']}"
            f"{': holds vectors of them' if one['holds_vector'] else ''}"
            f"{'; deleted' if one['retired'] else ''}",
        )
        for one in found["models"]
    ]
    return [*rows, *(("can't be asked", line) for line in found["out_of_reach"])]


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
    rows += [("made again: " + name, told) for name, told in receipt["made_again"].items()]
    if receipt["export_removed"]:
        rows.append(("export", "removed: pomona export --out OUT makes it again"))
    rows += [("still names a photo", name) for name in copies["left"]]
    return _two_columns([*rows, *_saw(receipt), ("receipt", receipt["file"])])


def allowed(record: dict[str, Any]) -> Table:
    """Return the rows of ``pomona forget --allow``."""
    return _two_columns(
        [("allowed", f"{record['allowed']:,}"), ("tombstones left", f"{record['tombstones']:,}")]
    )


def inspection(found: dict[str, Any]) -> Group:
    """Return the tables of ``pomona inspect``."""
    duplicates = found["duplicates"]
    splits = ", ".join(f"{n:,} {name}" for name, n in found["splits"].items())
    others = ", ".join(f"{n:,} {s or 'without suffix'}" for s, n in found["not_photos"].items())
    rows = [
        ("source", found["source"]),
        ("photos", f"{found['photos']:,} ({splits}), {found['bytes'] / 1e6:,.1f} MB"),
        ("labels", f"{found['labels']:,}"),
        ("pixels", ", ".join(f"{size} ({n:,})" for size, n in found["pixel_sizes"])),
        ("unrecognised", f"{found['unrecognised']:,}"),
        (
            "exact copies",
            f"{duplicates['within']:,} within a split, {duplicates['between']:,} "
            "Test photos that are in Training too",
        ),
        ("not photos", others or "none"),
        ("outside splits", f"{found['outside_splits']:,}"),
    ]
    for split, labels in found["only_in"].items():
        rows.append((f"only in {split}", f"{len(labels):,} labels"))
    if found["hint"]:
        rows.append(("hint", found["hint"]))
    labels = Table("largest", "photos", "smallest", "photos", box=None)
    for (big, many), (small, few) in zip(found["largest"], found["smallest"], strict=True):
        labels.add_row(big, f"{many:,}", small, f"{few:,}")
    return Group(_two_columns(rows), labels)


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
    return _two_columns(rows)


def cloud_jobs(found: dict[str, Any]) -> Table | str:
    """Return the table of ``pomona cloud emr status``."""
    if not found["jobs"]:
        return f"{found['stack']} ({found['mode']}) has no jobs yet"
    table = Table("job", "state", "started", "took", box=None, pad_edge=False)
    for job in found["jobs"]:
        table.add_row(job["job"], job["state"], job["started"] or "", _duration(job["seconds"]))
    return table


def cloud_holdings(held: dict[str, Any]) -> str:
    """Say what ``pomona cloud emr teardown`` is about to delete."""
    lines = [f"the stack {held['stack']} in {held['region']}, with"]
    if held["compute"]:
        lines.append(f"  {held['compute']}, where {len(held['jobs'])} jobs are not over")
    lines += [f"  s3://{name}, {count:,} objects" for name, count in held["objects"].items()]
    return "\n".join(lines)
