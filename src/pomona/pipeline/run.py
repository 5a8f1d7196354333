"""``run``: all stages, one after the other; and what comes after them: report, MLflow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pomona.core.progress import OnTick, Tick, quiet
from pomona.model.pca_table import FOLDERS, read_photos
from pomona.model.selection import SEARCH_ROWS
from pomona.pipeline import report_page
from pomona.pipeline.extract import ExtractOptions, extract
from pomona.pipeline.reduce import ReduceOptions, reduce
from pomona.pipeline.report_figures import check_matplotlib
from pomona.pipeline.train import TrainOptions, check, train
from pomona.spark.session import Cluster
from pomona.workspace import layout


def run(
    source: str | Path,
    out: str | Path,
    extract_options: ExtractOptions | None = None,
    reduce_options: ReduceOptions | None = None,
    cluster: Cluster | None = None,
    on_tick: OnTick = quiet,
    train_options: TrainOptions | None = TrainOptions(),  # noqa: B008 - frozen
    after: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run every stage; without ``train_options`` there is no training.

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
        check_matplotlib()  # before the long part, not after it
    if train_options:
        check(train_options)
    with contextlib.ExitStack() as keep:  # one session for all stages: reduce finds it active
        records = {"extract": extract(source, out, extract_options, cluster, on_tick, keep)}
        after("extract")
        records["reduce"] = reduce(out, reduce_options, cluster, on_tick)
        after("reduce")
    if train_options and records["extract"]["labels"] < 2:
        records["train"] = {"skipped": "all photos have the same label"}
    elif train_options:
        records["train"] = train(out, train_options, on_tick)
        after("train")
    if plots:
        report(out, on_tick, str(source))
    return records


def report(out: str | Path, on_tick: OnTick = quiet, source: str | None = None) -> Path:
    """Write ``OUT/report/report.html`` from what there is in OUT, and return its path.

    Thumbnails come from the source, by default the one that OUT names.
    """
    folder = layout.open_out(out, must_exist=True)
    on_tick(Tick("report"))
    training, test = (read_photos(folder, table, SEARCH_ROWS) for table in FOLDERS.values())
    return report_page.write(folder, training, test, source)


def track(out: str | Path, records: dict[str, Any]) -> str:
    """Record a run in MLflow. Returns a sentence that tells where, or why not."""
    from pomona.registry import tracking

    folder = layout.open_out(out, must_exist=True)
    return tracking.record(folder, *tracking.figures(records), tracking.artifacts(folder))
