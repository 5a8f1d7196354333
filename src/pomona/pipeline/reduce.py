"""The stage ``reduce``: scaler and PCA, fitted on Training and applied to all photos."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pomona.core.errors import RequestError
from pomona.core.files import read_json
from pomona.core.progress import OnTick, Tick, quiet
from pomona.core.provenance import utc_now
from pomona.model.projection import Projection, count_for, fit, load_projection
from pomona.pipeline import reduce_tasks
from pomona.pipeline.extract import GetSpark
from pomona.spark import executors
from pomona.spark.session import Cluster, lazy_session
from pomona.workspace import feature_table, layout
from pomona.workspace.layout import Out


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
    folder = layout.open_out(out, must_exist=True)
    if options.plots:
        from pomona.pipeline.report_figures import check_matplotlib

        check_matplotlib()
    cluster = replace(cluster or Cluster(), log_file=folder.log)
    with layout.lock(folder), lazy_session(cluster) as spark:
        _refuse_unfinished(folder)
        names = ("components", "scale", "whiten", "power")
        settings = {name: getattr(options, name) for name in names}
        made_from = {"features": feature_table.digest(folder), "settings": settings}
        old = read_json(folder.manifest).get("stages", {}).get("reduce", {})
        if old.get("made_from") == made_from and reduce_tasks.is_whole(folder, old):
            if options.plots and not (folder.report / "pca_variance.png").exists():
                _plot(load_projection(folder.projection), folder.report)
            return dict(old)
        return _reduce(folder, options, made_from, spark, on_tick)


def _refuse_unfinished(out: Out) -> None:
    if not read_json(out.table_file).get("files"):
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
    groups = reduce_tasks.row_groups(out)
    steps = len(groups) + 1

    def tick(done: int) -> None:
        on_tick(Tick("reduce", done, steps))

    tick(0)
    run_tasks = executors.runner(spark(), out.root)
    moments = reduce_tasks.moments(out, groups, options.power, run_tasks, tick)
    fitted = fit(
        moments, options.components, scale=options.scale, whiten=options.whiten, power=options.power
    )
    seconds = {"fit": time.time() - start}
    tick(len(groups))
    digests, rows = reduce_tasks.write(out, fitted, made_from, run_tasks)
    if options.plots:
        _plot(fitted, out.report)
    tick(steps)
    seconds["transform"] = time.time() - start - seconds["fit"]
    record = _record(fitted, made_from, digests, rows, seconds)
    layout.update(out, "reduce", record)
    return record


def _record(
    projection: Projection,
    made_from: dict[str, Any],
    digests: dict[str, str],
    rows: dict[str, int],
    seconds: dict[str, float],
) -> dict[str, Any]:
    ratio = projection.explained_variance_ratio
    return {
        "made_from": made_from,
        "photos_fitted": projection.count,
        "rows": rows,
        "components": projection.k,
        "variance_kept": projection.kept,
        "components_for_95": count_for(ratio, 0.95),
        "first_components": [float(r) for r in ratio[:10]],
        "compression_ratio": len(projection.mean) / projection.k,
        "digests": digests,
        "times": {
            "finished": utc_now(),
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
        },
    }


def _plot(projection: Projection, folder: Path) -> None:
    from pomona.pipeline.report_figures import plot_variance

    plot_variance(projection, folder / "pca_variance.png")
