"""The stage ``extract``: bring the table of features up to date with a source."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pomona.backbone.spec import BackboneSpec, make_spec, onnx_file
from pomona.backbone.weights import load_weights
from pomona.core.errors import JobError, MismatchError, RequestError, SourceError
from pomona.core.files import FORMAT, atomic_file, make_folder, read_json, sha256, write_json
from pomona.core.parquet import write_chunks
from pomona.core.progress import OnTick, Tick, quiet
from pomona.core.provenance import utc_now
from pomona.core.schema import SPLITS, UNREADABLE
from pomona.core.uris import local_path
from pomona.engine.engine import Engine
from pomona.photos.listing import Listing, list_files
from pomona.photos.source import SUFFIXES, Source, arrange, open_source
from pomona.pipeline.engines import open_engine, wants_spark
from pomona.pipeline.extract_hadoop import run_hadoop
from pomona.pipeline.extract_task import ExtractTask, photos_per_task, task_bounds
from pomona.pipeline.verification import changed_photos, damaged_files
from pomona.spark.binary_files import list_hadoop
from pomona.spark.engine import SparkEngine
from pomona.spark.resources import gpus_elsewhere
from pomona.spark.session import Cluster
from pomona.workspace import feature_table, layout, tombstones
from pomona.workspace.compaction import WriteFile, commit_compaction, plan_compaction
from pomona.workspace.layout import Out

log = logging.getLogger("pomona")

ROUNDS = 5
"""Times that photos of damaged files are extracted again before the disk is blamed."""


@dataclass(frozen=True)
class ExtractOptions:
    """How photos become features; see ``pomona extract --help``."""

    weights: str | None = None
    backend: str = "onnx"
    device: str = "auto"
    image_size: int = 224
    batch_size: int | None = None
    label: str = "parent"
    test_fraction: float | None = None
    keep_deleted: bool = False
    source_moved: bool = False
    reader: str = "auto"  # spark: through binaryFile, whatever the source
    verify: bool = False  # compare digests of photos and of the table, not only sizes and times
    csv_safe: bool = False  # no cell of rejected.csv is a formula


@dataclass(frozen=True)
class Extraction:
    """What the steps of `extract` share."""

    out: Out
    source: Source
    spec: BackboneSpec
    tuned_on: tuple[str, ...]
    options: ExtractOptions
    engine: Engine
    on_tick: OnTick


def extract(
    source: str | Path,
    out: str | Path,
    options: ExtractOptions | None = None,
    cluster: Cluster | None = None,
    on_tick: OnTick = quiet,
    keep: contextlib.ExitStack | None = None,
) -> dict[str, Any]:
    """Bring ``OUT/features`` up to date with a source. Returns the stage's record in the manifest.

    Workers are started only if there is something to do; with ``keep`` a Spark session that is
    started runs until that is closed.

    Raises
    ------
    RequestError
        And its kinds: what was asked for can't be. Nothing in OUT has changed then.
    JobError
        If the engine gave up. What is done is kept.
    """
    options = options or ExtractOptions()
    opened = open_source(source)
    _refuse_nesting(opened, str(out))
    if options.reader == "spark":
        opened = replace(opened, kind="hadoop")
    if options.verify and opened.kind == "hadoop":
        raise RequestError("--verify reads each photo, and not through Spark's binaryFile")
    cluster = cluster or Cluster()
    weights = load_weights(options.weights, lambda *done: on_tick(Tick("weights", *done)))
    spec = make_spec(
        weights,
        image_size=options.image_size,
        backend=options.backend,
        device=options.device,
        batch_size=options.batch_size,
        elsewhere=wants_spark(cluster) and gpus_elsewhere(cluster, options.device),
    )
    folder = layout.open_out(out)
    cluster = replace(cluster, log_file=folder.log)
    by_hadoop = opened.kind == "hadoop"
    with (
        layout.lock(folder),
        open_engine(cluster, spec.device, needs_spark=by_hadoop, keep=keep) as engine,
    ):
        tombstones.refuse_erasing(folder)
        stage = Extraction(folder, opened, spec, weights.tuned_on, options, engine, on_tick)
        table = _table(stage)
        started = time.time()
        photos, forgotten = tombstones.leave_out(folder, _list(stage))
        if not photos.num_rows:
            raise SourceError(f"all {forgotten} photos of {opened.name} are forgotten")
        if not folder.table_file.exists():
            write_json(folder.table_file, table)
        if not folder.backbone.exists():
            with atomic_file(folder.backbone) as part:
                part.write_bytes(onnx_file(spec))
        return _extract(stage, photos, table, time.time() - started, forgotten)


def _refuse_nesting(source: Source, out: str) -> None:
    if source.kind != "local" or ("://" in out and not out.startswith("file://")):
        return
    folder = local_path(out)
    if folder.is_relative_to(source.root):
        raise RequestError(f"--out {out} lies inside the source: choose a folder outside it")
    if Path(source.root).is_relative_to(folder):
        raise RequestError(f"the source lies inside --out {out}: choose another folder")


def _table(stage: Extraction) -> dict[str, Any]:
    """Return the content of ``_table.json``; refuse what doesn't fit the table that is there."""
    out, source, spec, options = stage.out, stage.source, stage.spec, stage.options
    table = read_json(out.table_file)
    fingerprint = spec.fingerprint()
    asked = {
        "format": FORMAT,
        "spec": fingerprint,
        "weights": spec.weights,
        "tuned_on": list(stage.tuned_on),
        "source": source.name,
        "label": options.label,
        "test_fraction": options.test_fraction,
    }
    if not table:
        return {**asked, "files": {}}
    for key, new in fingerprint.items():
        if (old := table["spec"].get(key)) != new:
            raise MismatchError(
                f"{out.root} was made with {key} {_short(old)}, now it is {_short(new)}, and "
                "features of both don't mix: keep the old setting, or choose another --out"
            )
    if table["source"] != source.name and not options.source_moved:
        raise MismatchError(
            f"{out.root} was made from {table['source']}, not {source.name}: choose another --out, "
            "or, if the photos have moved there, add --source-moved"
        )
    return {**table, **asked}


def _short(value: object) -> str:
    return f"size {value.get('image_size')}" if isinstance(value, dict) else str(value)[:12]


def _list(stage: Extraction) -> pa.Table:
    source, options = stage.source, stage.options
    listing = list_source(source, stage.engine, stage.on_tick)
    photos = arrange(listing.files, options.label, options.test_fraction, root=source.folder)
    if not photos.num_rows:
        raise SourceError(
            f"{source.name} holds no photos ({sum(listing.others.values())} other files): photos "
            f"end in {' '.join(SUFFIXES)}"
        )
    return photos


def list_source(source: Source, engine: Engine, on_tick: OnTick = quiet) -> Listing:
    """List any kind of source. One that only Hadoop reads needs Spark's engine."""
    on_tick(Tick("list"))
    if source.kind == "hadoop":
        assert isinstance(engine, SparkEngine)
        return list_hadoop(engine.session, source)
    return list_files(source, lambda count: on_tick(Tick("list", count)))


def _extract(
    stage: Extraction, photos: pa.Table, table: dict[str, Any], listing: float, forgotten: int
) -> dict[str, Any]:
    seconds = {"list": listing, "extract": 0.0, "table": 0.0}
    parts = feature_table.parts_folder(stage.out, stage.spec.fingerprint())
    verify = stage.options.verify
    unreadable = set(damaged_files(stage.out, stage.on_tick) if verify else ())
    computed = 0
    for _ in range(ROUNDS):  # one, unless files turn out to be damaged
        index = feature_table.index(stage.out, parts, damaged="drop", unreadable=unreadable)
        if stage.options.keep_deleted:
            photos = _with_deleted(stage, photos, index)
        rows = feature_table.match(photos, index)
        todo = _todo(rows)
        if verify:
            changed, damaged = changed_photos(
                stage.out, stage.source, rows, index, stage.engine, stage.on_tick
            )
            unreadable |= damaged
            todo, verify = pc.or_(todo, pa.array(changed)), bool(damaged)
            if damaged:
                continue
        waiting = rows.filter(todo).select(photos.column_names)
        if waiting.num_rows:
            start = time.time()
            stage.on_tick(Tick("start", photos.num_rows - waiting.num_rows, photos.num_rows))
            stage.engine.start()
            seconds["start"] = seconds.get("start", 0.0) + time.time() - start
            start = time.time()
            _compute(stage, waiting, parts, photos.num_rows)
            seconds["extract"] += time.time() - start
            computed += waiting.num_rows
            index = feature_table.index(stage.out, parts, damaged="drop", unreadable=unreadable)
            rows = feature_table.match(photos, index)
        start = time.time()
        damaged = _compact(stage, rows, index, table)
        seconds["table"] += time.time() - start
        if not damaged:
            break
        unreadable |= damaged
    else:
        raise JobError(f"files in {stage.out.root} were damaged again and again: check the disk")
    record = {**_record(stage, photos), "forgotten": forgotten}
    record["times"] = {
        "finished": utc_now(),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "computed": computed,
        "photos_per_second": round(computed / max(seconds["extract"], 1e-9), 1),
    }
    layout.update(stage.out, "extract", record)
    return record


def _with_deleted(stage: Extraction, photos: pa.Table, index: feature_table.Index) -> pa.Table:
    deleted, _ = tombstones.leave_out(stage.out, feature_table.deleted(photos, index))
    return pa.concat_tables([photos, deleted]).sort_by(
        [("split", "ascending"), ("path", "ascending")]
    )


def _todo(rows: pa.Table) -> pa.Array:
    """Return which photos to extract. One that couldn't be read may have been out of reach."""
    unread = pc.equal(pc.fill_null(rows["error"], ""), UNREADABLE)
    return pc.or_(pc.is_null(rows["file"]), unread)


def _compute(stage: Extraction, todo: pa.Table, parts: Path, total: int) -> None:
    before = total - todo.num_rows
    run = feature_table.new_run()
    make_folder(parts)
    write_json(stage.out.work / "plan.json", {"photos": total, "before": before, "run": run})

    def poll() -> None:
        done = feature_table.count_parts(parts, run)
        stage.on_tick(Tick("extract", before + done.done, total, done.rejected))

    poll()
    out, engine = stage.out, stage.engine
    engine.check(stage.spec, stage.source, todo["path"][:5].to_pylist())
    fitted = engine.fit(stage.spec)
    part = feature_table.PartFile(str(parts), run)
    if stage.source.kind == "hadoop":
        assert isinstance(engine, SparkEngine)
        per_task = photos_per_task(todo.num_rows, engine.slots, engine.most_photos)
        run_hadoop(engine.session, out, stage.source, todo, per_task, fitted, part, poll)
    else:
        bounds = task_bounds(todo.num_rows, engine.slots, engine.most_photos)
        write_chunks(chunks := out.work / "todo.arrow", todo, bounds)
        task = ExtractTask(str(chunks), stage.source, fitted, part)
        engine.run_chunks(task, range(len(bounds) - 1), out.root, poll)
    poll()


def _compact(
    stage: Extraction, rows: pa.Table, index: feature_table.Index, table: dict[str, Any]
) -> set[str]:
    """Write the new table. Returns the files that can't be read; nothing has changed then."""
    plan = plan_compaction(rows, index)
    staged = stage.out.work / f"features-{feature_table.new_run()}"
    results: list[dict[str, Any]] = []
    if plan.names:
        stage.on_tick(Tick("table", 0, plan.plan.num_rows))
        chunks = stage.out.work / "compact.arrow"
        write_chunks(chunks, plan.plan, plan.bounds)
        task = WriteFile(
            str(chunks), str(stage.out.root), tuple(index.files), tuple(plan.names), str(staged)
        )
        results = stage.engine.run_tasks(task, len(plan.names), stage.out.root)
        stage.on_tick(Tick("table", plan.plan.num_rows, plan.plan.num_rows))
    damaged = {name for result in results for name in result.get("damaged", ())}
    if damaged:
        log.warning("damaged, so their photos are extracted again: %s", ", ".join(sorted(damaged)))
    else:
        commit_compaction(stage.out, plan, results, staged, table)
    return damaged


def _record(stage: Extraction, photos: pa.Table) -> dict[str, Any]:
    codes = feature_table.write_rejected(stage.out, csv_safe=stage.options.csv_safe)
    in_split = {split: pc.equal(photos["split"], split) for split in SPLITS}
    return {
        "source": stage.source.name,
        "settings": {
            "label": stage.options.label,
            "test_fraction": stage.options.test_fraction,
            "csv_safe": stage.options.csv_safe,
            "device": stage.spec.device,
            "batch_size": stage.spec.batch_size,
            "weights": stage.spec.weights,
            **stage.spec.fingerprint(),
        },
        "photos": photos.num_rows,
        "splits": {split: pc.sum(mask).as_py() or 0 for split, mask in in_split.items()},
        "labels": pc.count_distinct(photos["label"]).as_py(),
        "rejected": codes,
        "digests": {
            "features": feature_table.digest(stage.out),
            "rejected.csv": sha256(stage.out.rejected),
        },
    }


def rejected_share(record: dict[str, Any]) -> float:
    """Return the share of photos without features."""
    return float(sum(record["rejected"].values()) / max(1, record["photos"]))
