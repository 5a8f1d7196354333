"""The stage ``extract``: bring the table of features up to date with a source."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pomona.backbone.spec import BackboneSpec, make_spec, onnx_file
from pomona.backbone.weights import Weights, load_weights
from pomona.core.errors import CrashError, MismatchError, RequestError, SourceError
from pomona.core.files import FORMAT, atomic_file, read_json, sha256, write_json
from pomona.core.parquet import even_bounds, write_chunks
from pomona.core.progress import OnTick, Tick, quiet
from pomona.core.provenance import utc_now
from pomona.core.schema import SPLITS, UNREADABLE
from pomona.core.uris import local_path
from pomona.photos.listing import Listing, list_files
from pomona.photos.source import SUFFIXES, Source, arrange, open_source
from pomona.pipeline.extract_hadoop import add_missing, run_hadoop
from pomona.pipeline.extract_task import ExtractTask
from pomona.spark import binary_files, executors, resources, tasks
from pomona.spark.session import Cluster, lazy_session
from pomona.workspace import feature_table, layout, tombstones
from pomona.workspace.compaction import WriteFile, commit_compaction, plan_compaction
from pomona.workspace.layout import Out

log = logging.getLogger("pomona")

GetSpark = Callable[[], Any]


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


@dataclass(frozen=True)
class Job:
    """What the steps of one extract share."""

    out: Out
    source: Source
    spec: BackboneSpec
    tuned_on: tuple[str, ...]
    options: ExtractOptions
    spark: GetSpark
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

    Spark is started only if there is something to do; with ``keep`` it runs until that is closed.

    Raises
    ------
    RequestError
        And its kinds: what was asked for can't be. Nothing in OUT has changed then.
    JobError
        If Spark gave up. What is done is kept.
    """
    options = options or ExtractOptions()
    where = open_source(source)
    _refuse_nesting(where, str(out))
    if options.reader == "spark":
        where = replace(where, kind="hadoop")
    cluster = cluster or Cluster()
    weights = load_weights(
        options.weights, lambda done, total: on_tick(Tick("weights", done, total))
    )
    spec = _spec(weights, options, cluster)
    folder = layout.open_out(out)
    cluster = replace(cluster, log_file=folder.log)
    cluster = replace(cluster, master=resources.local_master(cluster.master, spec.device))
    with layout.lock(folder), contextlib.ExitStack() as mine:
        tombstones.refuse_erasing(folder)
        spark = (keep or mine).enter_context(lazy_session(cluster))
        job = Job(folder, where, spec, weights.tuned_on, options, spark, on_tick)
        table = _table(job)
        started = time.time()
        photos, forgotten = tombstones.leave_out(folder, _list(job))
        if not photos.num_rows:
            raise SourceError(f"all {forgotten} photos of {where.name} are forgotten")
        if not folder.table_file.exists():
            write_json(folder.table_file, table)
        if not folder.backbone.exists():
            with atomic_file(folder.backbone) as part:
                part.write_bytes(onnx_file(spec))
        return _extract(job, photos, table, {"list": time.time() - started}, forgotten)


def _refuse_nesting(where: Source, out: str) -> None:
    if where.kind != "local" or ("://" in out and not out.startswith("file://")):
        return
    place = local_path(out)
    if place.is_relative_to(where.root):
        raise RequestError(f"--out {out} lies inside the source: choose a folder outside it")
    if Path(where.root).is_relative_to(place):
        raise RequestError(f"the source lies inside --out {out}: choose another folder")


def _spec(weights: Weights, options: ExtractOptions, cluster: Cluster) -> BackboneSpec:
    return make_spec(
        weights,
        image_size=options.image_size,
        backend=options.backend,
        device=options.device,
        batch_size=options.batch_size,
        elsewhere=resources.gpus_elsewhere(cluster, options.device),
    )


def _table(job: Job) -> dict[str, Any]:
    """Return what made the table, checked against what is asked for."""
    out, source, spec, options = job.out, job.source, job.spec, job.options
    table = read_json(out.table_file)
    asked = {
        "format": FORMAT,
        "spec": spec.fingerprint(),
        "weights": spec.weights,
        "tuned_on": list(job.tuned_on),
        "source": source.name,
        "label": options.label,
        "test_fraction": options.test_fraction,
    }
    if not table:
        return {**asked, "files": {}}
    for key, new in spec.fingerprint().items():
        old = table["spec"].get(key)
        if old != new:
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
    if isinstance(value, dict):
        return f"size {value.get('image_size')}"
    return str(value)[:12]


def _list(job: Job) -> pa.Table:
    listing = list_source(job.source, job.spark, job.on_tick)
    photos = arrange(
        listing.files, job.options.label, job.options.test_fraction, root=job.source.folder
    )
    if not photos.num_rows:
        others = sum(listing.others.values())
        raise SourceError(
            f"{job.source.name} holds no photos ({others} other files): photos end in "
            f"{' '.join(SUFFIXES)}"
        )
    return photos


def list_source(source: Source, spark: GetSpark, on_tick: OnTick = quiet) -> Listing:
    """List any kind of source."""
    on_tick(Tick("list"))
    if source.kind == "hadoop":
        return binary_files.list_hadoop(spark(), source)
    return list_files(source, lambda count: on_tick(Tick("list", count)))


def _extract(
    job: Job, photos: pa.Table, table: dict[str, Any], seconds: dict[str, float], forgotten: int
) -> dict[str, Any]:
    parts = feature_table.parts_folder(job.out, job.spec.fingerprint())
    found = feature_table.index(job.out, parts)
    if job.options.keep_deleted:
        deleted, _ = tombstones.leave_out(job.out, feature_table.deleted(photos, found))
        photos = pa.concat_tables([photos, deleted])
        photos = photos.sort_by([("split", "ascending"), ("path", "ascending")])
    rows = feature_table.match(photos, found)
    # A photo that couldn't be read may have been out of reach: it is tried again.
    unread = pc.equal(pc.fill_null(rows["error"], ""), UNREADABLE)
    todo = rows.filter(pc.or_(pc.is_null(rows["file"]), unread)).select(photos.column_names)
    start = time.time()
    if todo.num_rows:
        job.on_tick(Tick("spark", photos.num_rows - todo.num_rows, photos.num_rows))
        job.spark()
        seconds["spark"], start = time.time() - start, time.time()
        _compute(job, todo, parts, photos.num_rows)
        found = feature_table.index(job.out, parts)
        rows = feature_table.match(photos, found)
    seconds["extract"], start = time.time() - start, time.time()
    _compact(job, rows, found, table)
    seconds["table"] = time.time() - start
    record = {**_record(job, photos), "forgotten": forgotten}
    record["times"] = {
        "finished": utc_now(),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "computed": todo.num_rows,
        "photos_per_second": round(todo.num_rows / max(seconds["extract"], 1e-9), 1),
    }
    layout.update(job.out, "extract", record)
    return record


PHOTOS_PER_TASK = 512
"""About five seconds of work: what a killed task loses, and the grain of the progress shown. The
gap between tasks is 0.08 s, for the weights travel with each."""
MOST_TASKS = 50_000
"""What Spark's scheduler takes without effort; above it tasks grow."""


def photos_per_task(todo: int, slots: int) -> int:
    """Cut work so that tasks are short, not too many, and that all slots end together.

    >>> photos_per_task(100, 2), photos_per_task(16_525, 2), photos_per_task(100_000_000, 64)
    (8, 487, 1999)
    """
    share = -(-todo // (8 * slots))
    most = max(8, min(PHOTOS_PER_TASK, share), -(-todo // MOST_TASKS))
    rounds = -(-todo // (most * slots))
    return max(8, -(-todo // (rounds * slots)))


def _compute(job: Job, todo: pa.Table, parts: Path, total: int) -> None:
    before = total - todo.num_rows
    run = feature_table.new_run()
    parts.mkdir(parents=True, exist_ok=True)
    write_json(job.out.work / "plan.json", {"photos": total, "before": before, "run": run})

    def poll() -> None:
        done = feature_table.count_parts(parts, run)
        job.on_tick(Tick("extract", before + done.done, total, done.rejected))

    poll()
    session = job.spark()
    executors.check(session, job.spec.backend, job.source, todo["path"][:5].to_pylist())
    fitted = resources.fit_spec(job.spec, session)
    part = feature_table.PartFile(str(parts), run)
    per_task = photos_per_task(todo.num_rows, resources.slots(session))
    if job.source.kind == "hadoop":
        if not executors.share(session, job.out.root):
            raise RequestError(
                f"the executors don't see {job.out.root}, and photos of {job.source.name} need "
                "that: choose an --out on storage that driver and executors share"
            )
        _run_hadoop(job, session, todo, per_task, fitted, part, poll)
    else:
        bounds = even_bounds(todo.num_rows, per_task)
        chunks = job.out.work / "todo.arrow"
        write_chunks(chunks, todo, bounds)
        task = ExtractTask(str(chunks), job.source, fitted, part)
        executors.run_chunks(session, task, range(len(bounds) - 1), job.out.root, poll)
    poll()


def _run_hadoop(
    job: Job,
    session: Any,
    todo: pa.Table,
    per_task: int,
    spec: BackboneSpec,
    part: feature_table.PartFile,
    poll: tasks.Poll,
) -> None:
    def missing() -> pa.Table:
        found = feature_table.match(todo, feature_table.index(job.out, Path(part.folder)))
        return found.filter(pc.is_null(found["file"])).select(todo.column_names)

    try:
        photos = binary_files.HadoopPhotos(job.source.root, todo)
        run_hadoop(session, photos, per_task, spec, part, poll)
    except CrashError:  # where a task has one try: the rest once more, in child processes
        photos = binary_files.HadoopPhotos(job.source.root, missing())
        again = part._replace(run=feature_table.new_run())  # the numbers of its parts start anew
        run_hadoop(session, photos, per_task, replace(spec, guard="child"), again, poll)
    add_missing(missing(), spec, part, todo.num_rows)


def _compact(job: Job, rows: pa.Table, found: feature_table.Index, table: dict[str, Any]) -> None:
    plan = plan_compaction(rows, found)
    staged = job.out.work / f"features-{feature_table.new_run()}"
    results: list[dict[str, Any]] = []
    if plan.names:
        job.on_tick(Tick("table", 0, plan.plan.num_rows))
        chunks = job.out.work / "compact.arrow"
        write_chunks(chunks, plan.plan, plan.bounds)
        task = WriteFile(
            str(chunks), str(job.out.root), tuple(found.files), tuple(plan.names), str(staged)
        )
        run_tasks = executors.runner(job.spark(), job.out.root)
        results = run_tasks(task, len(plan.names))
        job.on_tick(Tick("table", plan.plan.num_rows, plan.plan.num_rows))
    commit_compaction(job.out, plan, results, staged, table)


def _record(job: Job, photos: pa.Table) -> dict[str, Any]:
    codes = feature_table.write_rejected(job.out)
    in_split = {split: pc.equal(photos["split"], split) for split in SPLITS}
    return {
        "source": job.source.name,
        "settings": {
            "label": job.options.label,
            "test_fraction": job.options.test_fraction,
            "device": job.spec.device,
            "batch_size": job.spec.batch_size,
            "weights": job.spec.weights,
            **job.spec.fingerprint(),
        },
        "photos": photos.num_rows,
        "splits": {split: pc.sum(mask).as_py() or 0 for split, mask in in_split.items()},
        "labels": pc.count_distinct(photos["label"]).as_py(),
        "rejected": codes,
        "digests": {
            "features": feature_table.digest(job.out),
            "rejected.csv": sha256(job.out.rejected),
        },
    }


def rejected_share(record: dict[str, Any]) -> float:
    """Return the share of photos without features, from an extract record."""
    rejected: int = sum(record["rejected"].values())
    return rejected / max(1, int(record["photos"]))
