"""The stages: each reads a table and writes a table, and computes only what isn't there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pomona import engine, executors, manifest, reduction, samples, tables, tombstones, training
from pomona import projection as proj
from pomona.engine import Cluster
from pomona.errors import RequestError
from pomona.extraction import ExtractOptions, GetSpark, extract, rejected_share
from pomona.manifest import Out
from pomona.ticks import OnTick, Tick, quiet
from pomona.training import TrainOptions, train

__all__ = [
    "ExtractOptions",
    "ReduceOptions",
    "Tick",
    "TrainOptions",
    "extract",
    "reduce",
    "rejected_share",
    "report",
    "run",
    "status",
    "track",
    "train",
]


@dataclass(frozen=True)
class ReduceOptions:
    """How features become PCA features; see ``pomona reduce --help``."""

    components: int | float = 50
    scale: bool = True
    whiten: bool = False
    power: float = 0.5
    plots: bool = True


def reduce(
    out: str | Path,
    options: ReduceOptions | None = None,
    cluster: Cluster | None = None,
    on_tick: OnTick = quiet,
) -> dict[str, Any]:
    """Fit scaler and PCA on Training and apply them to all photos. Returns the manifest's record.

    Nothing is computed if the features and the options are those of the outputs that are there.

    Raises
    ------
    RequestError
        And its kinds: there are no features, or too few photos.
    """
    options = options or ReduceOptions()
    if not 0 < options.power <= 1:
        raise RequestError(f"--power is above 0 and up to 1, not {options.power:g}")
    folder = manifest.open_out(out, must_exist=True)
    if options.plots:
        from pomona.report import check_matplotlib

        check_matplotlib()
    cluster = replace(cluster or Cluster(), log_file=folder.log)
    with manifest.lock(folder), engine.lazy_session(cluster) as spark:
        _refuse_unfinished(folder)
        settings = {
            "components": options.components,
            "scale": options.scale,
            "whiten": options.whiten,
            "power": options.power,
        }
        made_from = {"features": tables.digest(folder), "settings": settings}
        old = manifest.read_json(folder.manifest).get("stages", {}).get("reduce", {})
        if old.get("made_from") == made_from and reduction.is_whole(folder, old):
            if options.plots and not (folder.report / "pca_variance.png").exists():
                _plot(proj.load(folder.projection), folder.report)
            return dict(old)
        return _reduce(folder, options, made_from, spark, on_tick)


def _refuse_unfinished(out: Out) -> None:
    if not manifest.read_json(out.table_file).get("files"):
        raise RequestError(
            f"there are no features in {out.root}: pomona extract SOURCE --out … makes them"
        )
    if (out.work / "plan.json").exists():
        raise RequestError(
            f"extract isn't finished in {out.root}: run the same pomona extract again, it goes on"
        )


def _reduce(
    out: Out, options: ReduceOptions, made_from: dict[str, Any], spark: GetSpark, on_tick: OnTick
) -> dict[str, Any]:
    start = time.time()
    groups = reduction.row_groups(out)
    steps = len(groups) + 1

    def tick(done: int) -> None:
        on_tick(Tick("reduce", done, steps))

    tick(0)
    run_tasks = executors.runner(spark(), out.root)
    moments = reduction.moments(out, groups, options.power, run_tasks, tick)
    projection = proj.fit(
        moments,
        options.components,
        scale=options.scale,
        whiten=options.whiten,
        power=options.power,
    )
    fitted = time.time()
    tick(len(groups))
    digests, rows = reduction.write(out, projection, made_from, run_tasks)
    if options.plots:
        _plot(projection, out.report)
    tick(steps)
    record = {
        "made_from": made_from,
        "photos_fitted": projection.count,
        "rows": rows,
        "components": projection.k,
        "variance_kept": projection.kept,
        "components_for_95": proj.count_for(projection.explained_variance_ratio, 0.95),
        "first_components": [float(r) for r in projection.explained_variance_ratio[:10]],
        "compression_ratio": len(projection.mean) / projection.k,
        "digests": digests,
        "times": {
            "finished": manifest.now(),
            "seconds": {
                "fit": round(fitted - start, 2),
                "transform": round(time.time() - fitted, 2),
            },
        },
    }
    manifest.update(out, "reduce", record)
    return record


def _plot(projection: proj.Projection, folder: Path) -> None:
    from pomona.report import plot_variance

    plot_variance(projection, folder / "pca_variance.png")


# --- run, status -------------------------------------------------------------------------------


def run(
    source: str | Path,
    out: str | Path,
    extract_options: ExtractOptions | None = None,
    reduce_options: ReduceOptions | None = None,
    cluster: Cluster | None = None,
    on_tick: OnTick = quiet,
    train_options: TrainOptions | None = None,
    after: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Do every stage; without ``train_options`` there is no training.

    Parameters
    ----------
    after
        Called with the name of each stage that has ended, when nothing holds OUT.

    Returns
    -------
    dict
        The records by stage, as in the manifest. ``train`` is ``{"skipped": why}`` where there is
        nothing to tell apart.
    """
    plots = (reduce_options or ReduceOptions()).plots
    if plots:
        from pomona.report import check_matplotlib

        check_matplotlib()  # before the long part, not after it
    if train_options:
        training.check(train_options)
    with contextlib.ExitStack() as keep:  # one session for all stages: reduce finds it active
        first = extract(source, out, extract_options, cluster, on_tick, keep)
        after("extract")
        records = {"extract": first, "reduce": reduce(out, reduce_options, cluster, on_tick)}
        after("reduce")
    if train_options and first["labels"] < 2:
        records["train"] = {"skipped": "all photos have the same label"}
    elif train_options:
        records["train"] = train(out, train_options, on_tick)
        after("train")
    if plots:
        report(out, on_tick, str(source))
    return records


def report(out: str | Path, on_tick: OnTick = quiet, source: str | None = None) -> Path:
    """Write ``OUT/report/report.html`` about what there is in OUT, and return its path.

    Thumbnails come from the source, by default the one that OUT names.
    """
    from pomona import page

    folder = manifest.open_out(out, must_exist=True)
    on_tick(Tick("report"))
    some = [
        samples.read_photos(folder, name, training.SEARCH_ROWS)
        for name in ("training_pca", "test_pca")
    ]
    return page.write(folder, *some, source=source)


def track(out: str | Path, records: dict[str, Any]) -> str:
    """Record a run in MLflow. Returns a sentence that tells where, or why not."""
    from pomona import tracking

    folder = manifest.open_out(out, must_exist=True)
    return tracking.record(folder, *tracking.figures(records), tracking.artifacts(folder))


def status(out: str | Path) -> dict[str, Any]:
    """Tell how far OUT is, from what lies in it; the source isn't listed again.

    Returns
    -------
    dict
        ``photos``, ``done``, ``rejected`` (by code), ``todo``, ``finished`` (stages), ``running``,
        ``forgotten`` (tombstones), ``left_out`` (of the last listing), ``forgetting`` (unfinished),
        ``unnamed`` (photos that only the same forget, with their paths, can finish).
    """
    folder = manifest.open_out(out, must_exist=True)
    table = manifest.read_json(folder.table_file)
    if not table:
        raise RequestError(f"{out} holds nothing of Pomona's: pomona extract SOURCE --out {out}")
    plan = manifest.read_json(folder.work / "plan.json")
    parts = tables.parts_folder(folder, table["spec"])
    found = tables.index(folder, parts, look_only=True).rows
    photos = done = pc.count_distinct(found["path"]).as_py()
    if plan:  # rows of photos that are being replaced don't count as done
        photos = plan["photos"]
        done = min(photos, plan["before"] + tables.count_parts(parts, plan["run"]).done)
    bad = found.filter(pc.is_valid(found["error"])).group_by("error")
    codes = bad.aggregate([("path", "count_distinct")]).to_pylist()
    stages = manifest.read_json(folder.manifest).get("stages", {})
    unfinished = {"extract"} if plan else set()
    digest = tables.digest(folder)
    pending = tombstones.pending(folder)
    if stages.get("reduce", {}).get("made_from", {}).get("features") != digest:
        unfinished |= {"reduce", "train"}
    inputs = stages.get("train", {}).get("made_from", {}).get("digests", {})
    if any(stages.get("reduce", {})["digests"].get(n) != d for n, d in inputs.items()):
        unfinished.add("train")
    return {
        "source": table["source"],
        "photos": photos,
        "done": done,
        "rejected": {row["error"]: row["path_count_distinct"] for row in codes},
        "todo": photos - done,
        "finished": sorted(set(stages) - unfinished - {"track"}),
        "running": manifest.is_locked(folder),
        "forgotten": tombstones.total(folder),
        "left_out": stages.get("extract", {}).get("forgotten", 0),
        "forgetting": bool(pending),
        "unnamed": len(pending.get("unnamed", [])),
    }
