"""The stage ``extract``: bring the table of features up to date with a source."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pomona.backbone import extract as backbone
from pomona.backbone.spec import BackboneSpec, make_spec, onnx_file
from pomona.backbone.weights import load_weights
from pomona.core.errors import MismatchError, RequestError, SourceError
from pomona.core.files import FORMAT, atomic_file, read_json, sha256, write_json
from pomona.core.parquet import even_bounds, sliced, write_chunks
from pomona.core.progress import OnTick, Tick, quiet
from pomona.core.provenance import utc_now
from pomona.core.schema import SPLITS, UNREADABLE
from pomona.core.uris import local_path
from pomona.photos.listing import Listing, list_files
from pomona.photos.reading import read
from pomona.photos.source import SUFFIXES, Source, arrange, open_source
from pomona.pipeline.extract_hadoop import run_hadoop
from pomona.spark import binary_files, executors, resources
from pomona.spark.session import Cluster, lazy_session
from pomona.spark.tasks import Answer, at_task
from pomona.workspace import feature_table, layout, tombstones
from pomona.workspace.compaction import WriteFile, commit_compaction, plan_compaction
from pomona.workspace.layout import Out

GetSpark = Callable[[], Any]


@dataclass(frozen=True)
class ExtractTask:
    """Extract chunks of a list of photos into parts. A `pomona.spark.tasks.ChunkTask`."""

    chunks: str
    source: Source
    spec: BackboneSpec
    part: feature_table.PartFile

    @property
    def folder(self) -> str:
        """The folder of the parts."""
        return self.part.folder

    def write(self, photos: pa.RecordBatch, number: int, folder: str) -> Answer:
        """Write the part of chunk ``number``. Runs on workers."""
        spec = at_task(self.spec)
        # Sliced before reading: a worker holds the bytes of one network batch, not of the chunk.
        rows = backbone.extract(read(sliced([photos], spec.batch_size), self.source), spec)
        part = self.part._replace(folder=folder)
        return feature_table.write_part(part, number, rows)._asdict()

    def done(self) -> set[int]:
        """Return the chunks whose parts are in place."""
        paths = Path(self.folder).glob(f"{self.part.run}-*")
        return {feature_table.task_of(path.name) for path in paths}

    def careful(self) -> ExtractTask:
        """Return the task with photos decoded in child processes."""
        return replace(self, spec=replace(self.spec, guard="child"))


PHOTOS_PER_TASK = 512
"""About five seconds of work: what a killed task loses, and the step of the progress shown. The
gap between tasks is 0.08 s, since the weights are sent with each."""
MOST_TASKS = 50_000
"""What Spark's scheduler handles with ease; above it tasks grow."""


def photos_per_task(todo: int, slots: int) -> int:
    """Return a task's size such that tasks are short, not too many, and all slots end together.

    >>> photos_per_task(100, 2), photos_per_task(16_525, 2), photos_per_task(100_000_000, 64)
    (8, 487, 1999)
    """
    share = -(-todo // (8 * slots))
    most = max(8, min(PHOTOS_PER_TASK, share), -(-todo // MOST_TASKS))
    rounds = -(-todo // (most * slots))
    return max(8, -(-todo // (rounds * slots)))


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
    csv_safe: bool = False  # no cell of rejected.csv is a formula


@dataclass(frozen=True)
class Extraction:
    """What the steps of `extract` share."""

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
    opened = open_source(source)
    _refuse_nesting(opened, str(out))
    if options.reader == "spark":
        opened = replace(opened, kind="hadoop")
    cluster = cluster or Cluster()
    weights = load_weights(options.weights, lambda *done: on_tick(Tick("weights", *done)))
    spec = make_spec(
        weights,
        image_size=options.image_size,
        backend=options.backend,
        device=options.device,
        batch_size=options.batch_size,
        elsewhere=resources.gpus_elsewhere(cluster, options.device),
    )
    folder = layout.open_out(out)
    master = resources.local_master(cluster.master, spec.device)
    cluster = replace(cluster, log_file=folder.log, master=master)
    with layout.lock(folder), contextlib.ExitStack() as mine:
        tombstones.refuse_erasing(folder)
        spark = (keep or mine).enter_context(lazy_session(cluster))
        stage = Extraction(folder, opened, spec, weights.tuned_on, options, spark, on_tick)
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
    listing = list_source(source, stage.spark, stage.on_tick)
    photos = arrange(listing.files, options.label, options.test_fraction, root=source.folder)
    if not photos.num_rows:
        raise SourceError(
            f"{source.name} holds no photos ({sum(listing.others.values())} other files): photos "
            f"end in {' '.join(SUFFIXES)}"
        )
    return photos


def list_source(source: Source, spark: GetSpark, on_tick: OnTick = quiet) -> Listing:
    """List any kind of source."""
    on_tick(Tick("list"))
    if source.kind == "hadoop":
        return binary_files.list_hadoop(spark(), source)
    return list_files(source, lambda count: on_tick(Tick("list", count)))


def _extract(
    stage: Extraction, photos: pa.Table, table: dict[str, Any], listing: float, forgotten: int
) -> dict[str, Any]:
    seconds = {"list": listing}
    parts = feature_table.parts_folder(stage.out, stage.spec.fingerprint())
    index = feature_table.index(stage.out, parts)
    if stage.options.keep_deleted:
        deleted, _ = tombstones.leave_out(stage.out, feature_table.deleted(photos, index))
        photos = pa.concat_tables([photos, deleted])
        photos = photos.sort_by([("split", "ascending"), ("path", "ascending")])
    rows = feature_table.match(photos, index)
    # A photo that couldn't be read may have been out of reach for a while: it is tried again.
    unread = pc.equal(pc.fill_null(rows["error"], ""), UNREADABLE)
    todo = rows.filter(pc.or_(pc.is_null(rows["file"]), unread)).select(photos.column_names)
    start = time.time()
    if todo.num_rows:
        stage.on_tick(Tick("spark", photos.num_rows - todo.num_rows, photos.num_rows))
        stage.spark()
        seconds["spark"], start = time.time() - start, time.time()
        _compute(stage, todo, parts, photos.num_rows)
        index = feature_table.index(stage.out, parts)
        rows = feature_table.match(photos, index)
    seconds["extract"], start = time.time() - start, time.time()
    _compact(stage, rows, index, table)
    seconds["table"] = time.time() - start
    record = {**_record(stage, photos), "forgotten": forgotten}
    record["times"] = {
        "finished": utc_now(),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "computed": todo.num_rows,
        "photos_per_second": round(todo.num_rows / max(seconds["extract"], 1e-9), 1),
    }
    layout.update(stage.out, "extract", record)
    return record


def _compute(stage: Extraction, todo: pa.Table, parts: Path, total: int) -> None:
    before = total - todo.num_rows
    run = feature_table.new_run()
    parts.mkdir(parents=True, exist_ok=True)
    write_json(stage.out.work / "plan.json", {"photos": total, "before": before, "run": run})

    def poll() -> None:
        done = feature_table.count_parts(parts, run)
        stage.on_tick(Tick("extract", before + done.done, total, done.rejected))

    poll()
    session = stage.spark()
    executors.check(session, stage.spec.backend, stage.source, todo["path"][:5].to_pylist())
    fitted = resources.fit_spec(stage.spec, session)
    part = feature_table.PartFile(str(parts), run)
    per_task = photos_per_task(todo.num_rows, resources.slots(session))
    if stage.source.kind == "hadoop":
        if not executors.share(session, stage.out.root):
            raise RequestError(
                f"the executors don't see {stage.out.root}, and photos of {stage.source.name} need "
                "that: choose an --out on storage that driver and executors share"
            )
        run_hadoop(session, stage.out, stage.source.root, todo, per_task, fitted, part, poll)
    else:
        bounds = even_bounds(todo.num_rows, per_task)
        chunks = stage.out.work / "todo.arrow"
        write_chunks(chunks, todo, bounds)
        task = ExtractTask(str(chunks), stage.source, fitted, part)
        executors.run_chunks(session, task, range(len(bounds) - 1), stage.out.root, poll)
    poll()


def _compact(
    stage: Extraction, rows: pa.Table, index: feature_table.Index, table: dict[str, Any]
) -> None:
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
        run_tasks = executors.runner(stage.spark(), stage.out.root)
        results = run_tasks(task, len(plan.names))
        stage.on_tick(Tick("table", plan.plan.num_rows, plan.plan.num_rows))
    commit_compaction(stage.out, plan, results, staged, table)


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
    """Return the share of photos without features, from an extract record."""
    return float(sum(record["rejected"].values()) / max(1, record["photos"]))
