"""The stage ``reduce``: scaler and PCA, fitted on Training and applied to all photos.

Two passes over ``OUT/features``: moments, then projected rows. Both are tasks that read row groups
and write into ``OUT/_work``; whichever engine runs them, the sums are the same.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pomona.core.errors import DamagedError, RequestError
from pomona.core.files import read_json, sha256, tree_digest
from pomona.core.parquet import even_bounds, write_chunks
from pomona.core.progress import OnTick, Tick, quiet
from pomona.core.provenance import utc_now
from pomona.engine.engine import Engine
from pomona.model.pca_table import FOLDERS
from pomona.model.projection import (
    Moments,
    Projection,
    count_for,
    fit,
    load_projection,
    merge,
    save_projection,
)
from pomona.pipeline.engines import open_engine
from pomona.pipeline.reduce_tasks import Group, MomentsTask, ProjectTask, partitions
from pomona.pipeline.report_figures import check_matplotlib, plot_variance
from pomona.spark.session import Cluster
from pomona.workspace import feature_table, layout
from pomona.workspace.compaction import cut_by_split
from pomona.workspace.layout import Move, Out

GROUPS_PER_TASK = 4
"""20 MB of features: a second of work."""
MOST_MOMENTS = 64
"""Partial moments take 13 MB each; above so many, tasks grow."""

ROWS_PER_TASK = 100_000
VALUES_PER_TASK = 32_000_000
"""128 MB of pca_features: what one task holds, and a file's size."""


@dataclass(frozen=True)
class ReduceOptions:
    """How features become PCA features; see ``pomona reduce --help``."""

    components: int | float = 50
    scale: bool = True
    whiten: bool = False
    power: float = 0.5
    plots: bool = True
    csv_safe: bool = False  # no cell of the CSV is a formula


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
        check_matplotlib()
    cluster = replace(cluster or Cluster(), log_file=folder.log)
    with layout.lock(folder), open_engine(cluster) as engine:
        _refuse_unfinished(folder)
        settings = asdict(options)
        del settings["plots"]  # the numbers are the same
        if not options.csv_safe:  # an OUT from before there was such an option stays as it is
            del settings["csv_safe"]
        made_from = {"features": feature_table.digest(folder), "settings": settings}
        old = read_json(folder.manifest).get("stages", {}).get("reduce", {})
        whole = old.get("made_from") == made_from and _is_whole(folder, old)
        record = old if whole else _reduce(folder, options, made_from, engine, on_tick)
        if options.plots and not (picture := folder.report / "pca_variance.png").exists():
            plot_variance(load_projection(folder.projection), picture)
        return dict(record)


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
    out: Out, options: ReduceOptions, made_from: dict[str, Any], engine: Engine, on_tick: OnTick
) -> dict[str, Any]:
    start = time.time()
    groups = row_groups(out)
    steps = len(groups) + 1

    def tick(done: int) -> None:
        on_tick(Tick("reduce", done, steps))

    tick(0)
    training = moments(out, groups, options.power, engine, tick)
    scale, whiten, power = options.scale, options.whiten, options.power
    projection = fit(training, options.components, scale=scale, whiten=whiten, power=power)
    fitted = time.time()
    tick(len(groups))
    digests, rows = _write(out, projection, made_from, engine)
    tick(steps)
    ratio = projection.explained_variance_ratio
    seconds = {"fit": fitted - start, "transform": time.time() - fitted}
    record = {
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
    layout.update(out, "reduce", record)
    return record


def row_groups(out: Out) -> list[list[Group]]:
    """Cut the Training photos' row groups into tasks, always the same: it fixes the sums' order."""
    files = sorted(read_json(out.table_file)["files"])
    groups = [
        (f"features/{name}", number)
        for name in files
        if name.startswith("split=Training/")
        for number in range(pq.ParquetFile(out.features / name).num_row_groups)
    ]
    most = max(GROUPS_PER_TASK, -(-len(groups) // MOST_MOMENTS))
    return [groups[a:b] for a, b in itertools.pairwise(even_bounds(len(groups), most))]


def moments(
    out: Out,
    groups: list[list[Group]],
    power: float,
    engine: Engine,
    on_done: Callable[[int], None],
) -> Moments:
    """Return the moments of the Training photos. The driver holds two partial moments at a time."""
    folder = out.work / f"moments-{feature_table.new_run()}"
    folder.mkdir(parents=True)
    task = MomentsTask(str(out.root), tuple(tuple(group) for group in groups), str(folder), power)

    def poll() -> None:
        on_done(len(list(folder.glob("[0-9]*.npz"))))

    _refuse_damaged(engine.run_tasks(task, len(groups), out.root, poll))
    total = merge(_load(folder / f"{number}.npz") for number in range(len(groups)))
    shutil.rmtree(folder)
    return total


def _refuse_damaged(answers: list[dict[str, Any]]) -> None:
    """Raise what a task couldn't: from a worker it would come as one of Spark's errors."""
    for answer in answers:
        if "damaged" in answer:
            raise DamagedError(answer["damaged"])


def _load(path: Path) -> Moments:
    with np.load(path, allow_pickle=False) as part:
        return Moments(int(part["count"]), part["mean"], part["scatter"])


def _write(
    out: Out, projection: Projection, made_from: dict[str, Any], engine: Engine
) -> tuple[dict[str, str], dict[str, int]]:
    """Write the PCA tables and the projection, whole or not at all.

    Returns digests by output, and rows by table.
    """
    # A new name, so that a task that outlives a killed driver can't write into this run's files.
    staged = out.work / f"reduce-{feature_table.new_run()}"
    plan, files, bounds = _plan(out, projection.k)
    chunks = out.work / "project.arrow"
    write_chunks(chunks, plan, bounds)
    folders = partitions(pc.unique(plan["label"]).to_pylist())
    safe = made_from["settings"].get("csv_safe", False)
    task = ProjectTask(str(chunks), str(out.root), files, projection, str(staged), folders, safe)
    answers = engine.run_tasks(task, len(bounds) - 1, out.root)
    _refuse_damaged(answers)
    save_projection(projection, staged / "projection", made_from)
    names = [f"{name}{kind}" for name in FOLDERS.values() for kind in ("", "_csv")]
    moves: list[Move] = [
        (f"_work/{staged.name}/{name}" if (staged / name).exists() else None, name)
        for name in (*names, "projection")
    ]
    # Of another projection:
    moves += [(None, f"report/{n}") for n in ("pca_variance.png", "metrics.json", "report.html")]
    layout.commit(out, moves)
    shutil.rmtree(out.work, ignore_errors=True)
    rows = Counter(dict.fromkeys(FOLDERS.values(), 0))
    for answer in answers:
        rows.update(answer["rows"])
    return _digests(out, answers, names), dict(rows)


def _plan(out: Out, k: int) -> tuple[pa.Table, tuple[str, ...], list[int]]:
    """Return rows with features sorted by split and label, their files, and the tasks' bounds.

    A task holds rows of one split.
    """
    index = feature_table.index(out, out.work / "none")
    rows = index.rows.filter(pc.is_null(index.rows["error"]))
    rows = rows.sort_by([(name, "ascending") for name in ("split", "label", "path")])
    rows = rows.select(["path", "split", "label", "filename", "file", "row"])
    most = max(1, min(ROWS_PER_TASK, VALUES_PER_TASK // k))
    ends = [end for _, cuts in cut_by_split(rows, most) for end in cuts]
    return rows, tuple(index.files), [0, *ends]


def _digests(out: Out, answers: list[dict[str, Any]], names: list[str]) -> dict[str, str]:
    files = {name: sha for answer in answers for name, sha in answer["files"].items()}
    digests = {
        name: tree_digest({k: v for k, v in files.items() if k.startswith(f"{name}/")})
        for name in names
    }
    tensors = sha256(out.projection / "projection.safetensors")
    return {**digests, "projection.safetensors": tensors}


def _is_whole(out: Out, record: dict[str, Any]) -> bool:
    """Tell whether the outputs that a record names are there, made as it says and not later."""
    about = read_json(out.projection / "projection.json")
    if about.get("made_from") != record["made_from"]:
        return False
    empty = tree_digest({})
    folders = [n for n, digest in record["digests"].items() if digest != empty and "." not in n]
    return all((out.root / name).is_dir() for name in (*folders, "projection"))
