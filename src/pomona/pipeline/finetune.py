"""The stage ``finetune``: train the backbone on a source's own photos. Needs torch."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pomona.backbone import mobilenet
from pomona.backbone.weights import to_bytes
from pomona.core.errors import JobError, MismatchError, SourceError
from pomona.core.files import atomic_file, read_json, sha256, write_json
from pomona.core.progress import OnTick, Tick, quiet
from pomona.core.provenance import utc_now, versions
from pomona.finetune.dataset import JOB, load_dataset
from pomona.photos.listing import list_files
from pomona.photos.source import arrange
from pomona.pipeline.finetune_dataset import prepare
from pomona.pipeline.finetune_request import (
    OPTIONS,
    FinetuneOptions,
    Request,
    check,
    open_request,
)
from pomona.spark import tasks
from pomona.spark.session import Cluster, session
from pomona.workspace import layout, tombstones
from pomona.workspace.layout import Out

if TYPE_CHECKING:
    from pomona.finetune.checkpoint import Progress

__all__ = ["OPTIONS", "FinetuneOptions", "check", "finetune", "track"]


def finetune(
    source: str | Path,
    out: str | Path,
    options: FinetuneOptions | None = None,
    cluster: Cluster | None = None,
    on_tick: OnTick = quiet,
) -> dict[str, Any]:
    """Train weights on the photos of a source, and write them to ``OUT/weights.safetensors``.

    After a kill it resumes from its last checkpoint. Ctrl-C leaves the best weights so far. Nothing
    is computed if OUT holds the weights of the same photos and options.

    Returns
    -------
    dict
        The manifest's record, which is ``OUT/weights.json``, too.

    Raises
    ------
    RequestError
        If the request can't be met, also as one of its subclasses.
    JobError
        If the disk is too full, the loss became NaN, or Spark gave up (with several processes).
        What is done is kept.
    """
    request = open_request(source, out, options or FinetuneOptions(), cluster or Cluster(), on_tick)
    with layout.lock(request.out):
        tombstones.refuse_erasing(request.out)
        return _finetune(request, _list_photos(request))


def track(out: str | Path, record: dict[str, Any]) -> str:
    """Record a finetune in MLflow. Returns a sentence that tells where, or why not."""
    from pomona.registry import tracking

    folder = layout.open_out(out, must_exist=True)
    settings = record["made_from"]["settings"]
    params = {"source": record["made_from"]["source"], **settings, **record["recipe"]}
    params |= {name: (record["made_from"][name] or {}).get("name") for name in ("from", "teacher")}
    metrics = {"photos": record["photos"], "seconds": record["times"]["seconds"]}
    for part in ("held_out", "test"):
        metrics |= {f"{part}_{k}": v for k, v in record[part].items() if isinstance(v, float)}
    curves = {
        name: [(entry["step"], entry[name]) for entry in record["history"] if name in entry]
        for name in ("training_loss", "loss", "accuracy", "accuracy_by_group")
    }
    files = [folder.tuned, folder.tuned_about]
    return tracking.record(folder, params, metrics, files, curves)


def _list_photos(request: Request) -> pa.Table:
    """Return the source's photos with split and label, but for erased ones."""
    source, options, on_tick = request.source, request.options, request.on_tick
    on_tick(Tick("list"))
    listing = list_files(source, lambda count: on_tick(Tick("list", count)))
    photos = arrange(listing.files, options.label, options.test_fraction, root=source.folder)
    photos, _ = tombstones.leave_out(request.out, photos)
    if not photos.num_rows:
        raise SourceError(f"{source.name} holds no photos to train on")
    return photos


def _finetune(request: Request, photos: pa.Table) -> dict[str, Any]:
    """Do what isn't done yet, and return the record."""
    out, made_from = request.out, request.made_from(photos)
    if record := _finished(out, made_from):
        return record
    _refuse_other_run(out, made_from)
    if not (out.tuning / JOB).exists():
        prepare(request, photos, made_from)
    try:
        _train(request)
    except KeyboardInterrupt:
        _write(request, finished=False)
        raise
    record = _write(request, finished=True)
    shutil.rmtree(out.tuning, ignore_errors=True)
    return record


def _finished(out: Out, made_from: dict[str, Any]) -> dict[str, Any]:
    """Return the record of the weights in OUT; empty where there are none, or damaged ones.

    Raises
    ------
    MismatchError
        If they were made from something else.
    """
    record = read_json(out.tuned_about)
    if not record.get("finished") or not out.tuned.exists():
        return {}
    if sha256(out.tuned) != record["digests"][out.tuned.name]:
        return {}
    if record["made_from"] != made_from:
        raise MismatchError(
            f"{out.root} holds weights that were made with other "
            f"{_differences(made_from, record['made_from'])}: choose another --out, or remove "
            f"{out.tuned}"
        )
    return record


def _refuse_other_run(out: Out, made_from: dict[str, Any]) -> None:
    """Refuse to resume another request's run; remove a run that was killed in preparation."""
    unfinished = read_json(out.tuning / JOB).get("made_from")
    if unfinished is None:
        shutil.rmtree(out.tuning, ignore_errors=True)
    elif unfinished != made_from:
        raise MismatchError(
            f"{out.root} holds a finetune that isn't finished, with other "
            f"{_differences(made_from, unfinished)}: give the same command to go on, choose "
            f"another --out, or remove {out.tuning}"
        )


def _differences(made_from: dict[str, Any], other: dict[str, Any]) -> str:
    return " and ".join(name for name in made_from if made_from[name] != other.get(name))


def _train(request: Request) -> None:
    """Train in this process, or in several that Spark starts."""
    from pomona.finetune import trainer
    from pomona.finetune.checkpoint import read_progress

    folder, processes = request.out.tuning, request.options.processes

    def on_step(done: int, total: int) -> None:
        request.on_tick(Tick("finetune", done, total))

    def poll() -> None:
        if progress := read_json(folder / trainer.PROGRESS):
            on_step(**progress)

    if processes == 1:
        trainer.train(folder, request.device, on_step=on_step)
        return
    stop, log_file = folder / trainer.STOP, request.out.log
    stop.unlink(missing_ok=True)
    with session(replace(request.cluster, log_file=log_file)) as spark, _touched_on_error(stop):
        on_gpu = request.device == "cuda"
        function, argument = trainer.train_together, str(folder)
        tasks.run_torch(spark, processes, on_gpu, function, argument, poll, log_file)
    if not read_progress(folder / trainer.CHECKPOINT).ended:
        raise JobError("the processes ended before the training did: run the same command again")


@contextlib.contextmanager
def _touched_on_error(stop: Path) -> Iterator[None]:
    """Create a file if the block raises."""
    try:
        yield
    except BaseException:
        stop.touch()
        raise


def _write(request: Request, *, finished: bool) -> dict[str, Any]:
    """Write the best weights so far, if there are any, and the JSON beside them."""
    from pomona.finetune import trainer
    from pomona.finetune.checkpoint import read_progress
    from pomona.finetune.evaluation import evaluate
    from pomona.finetune.network import weights_of

    out, device = request.out, request.device
    if not read_progress(out.tuning / trainer.CHECKPOINT).best:
        return {}
    job = read_json(out.tuning / JOB)
    network, progress, seconds = trainer.load_result(out.tuning, device)
    state = weights_of(network)
    with atomic_file(out.tuned) as part:
        part.write_bytes(to_bytes(state, (*request.tuned_on, *job["tuned_on"])))
    record = {
        **{name: job[name] for name in ("made_from", "recipe", "photos", "rejected", "labels")},
        **_evaluations(job, progress),
        "finished": finished,
        "groups": len(job["groups"]),
        "test": {},
        "digests": {out.tuned.name: sha256(out.tuned), "weights": mobilenet.digest(state)},
        "versions": versions(),
        "device": device,
        "times": {"finished": utc_now(), "seconds": round(seconds, 1)},
    }
    if finished and request.options.judge_test:
        dataset = load_dataset(out.tuning)
        record["test"] = evaluate(network, dataset, dataset.test, device)
    write_json(out.tuned_about, record)
    layout.update(out, "finetune", {k: v for k, v in record.items() if k != "history"})
    return record


def _evaluations(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Return the record's part about what is held out, and how the run went on it."""
    return {
        "held_out": {
            "by": job["by"],
            "photos": job["held_out_photos"],
            "groups": job["held_out"],
            "weights_saw": job["weights_saw"],
            "before": progress.before,
            **progress.best,
        },
        "ended": progress.ended or "interrupted",
        "history": progress.history,
    }
