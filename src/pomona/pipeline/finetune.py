"""The stage ``finetune``: train the backbone on a source's own photos. Needs torch."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pomona.backbone import mobilenet
from pomona.backbone.weights import to_bytes
from pomona.core.errors import JobError, MismatchError, SourceError
from pomona.core.files import atomic_file, read_json, sha256, write_json
from pomona.core.progress import OnTick, Tick, quiet
from pomona.core.provenance import utc_now, versions
from pomona.finetune.dataset import JOB, load_dataset
from pomona.finetune.recipe import Progress
from pomona.photos.listing import list_files
from pomona.photos.source import arrange
from pomona.pipeline.finetune_dataset import prepare
from pomona.pipeline.finetune_request import FinetuneOptions, Request, open_request
from pomona.spark import tasks
from pomona.spark.session import Cluster, session
from pomona.workspace import layout, tombstones
from pomona.workspace.layout import Out

__all__ = ["FinetuneOptions", "finetune", "track"]


def finetune(
    source: str | Path,
    out: str | Path,
    options: FinetuneOptions | None = None,
    cluster: Cluster | None = None,
    on_tick: OnTick = quiet,
) -> dict[str, Any]:
    """Train weights on the photos of a source, and write them to ``OUT/weights.safetensors``.

    Returns the manifest's record, which is ``OUT/weights.json``, too. After a kill it resumes from
    its last checkpoint. Ctrl-C leaves the best weights so far. Nothing is computed if OUT holds the
    weights of the same photos and options.

    Raises RequestError, or one of its subclasses, if the request can't be met; JobError if the disk
    is too full, the loss became NaN, or Spark gave up (with several processes): what is done is
    kept then.
    """
    request = open_request(source, out, options or FinetuneOptions(), cluster or Cluster(), on_tick)
    folder = request.out
    with layout.lock(folder):
        tombstones.refuse_erasing(folder)
        photos = _list_photos(request)
        made_from = request.made_from(photos)
        if record := _finished(folder, made_from):
            return record
        _refuse_other_run(folder, made_from)
        if not (folder.tuning / JOB).exists():
            prepare(request, photos, made_from)
        try:
            _train(request)
        except KeyboardInterrupt:
            _write(request, finished=False)
            raise
        record = _write(request, finished=True)
        shutil.rmtree(folder.tuning, ignore_errors=True)
        return record


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


def _finished(out: Out, made_from: dict[str, Any]) -> dict[str, Any]:
    """Return the record of the weights in OUT; empty where there are none, or damaged ones.

    Raises MismatchError if they were made from something else.
    """
    record = read_json(out.tuned_about)
    is_there = record.get("finished") and out.tuned.exists()
    if not is_there or sha256(out.tuned) != record["digests"][out.tuned.name]:
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
    from pomona.finetune import checkpoint, trainer

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
    on_gpu, function = request.device == "cuda", trainer.train_together
    with session(replace(request.cluster, log_file=log_file)) as spark:
        try:
            tasks.run_torch(spark, processes, on_gpu, function, str(folder), poll, log_file)
        except BaseException:
            stop.touch()
            raise
    if not checkpoint.read_progress(folder / trainer.CHECKPOINT).ended:
        raise JobError("the processes ended before the training did: run the same command again")


def _write(request: Request, *, finished: bool) -> dict[str, Any]:
    """Write the best weights so far, if there are any, and the JSON beside them."""
    from pomona.finetune import checkpoint, network, trainer

    out, device = request.out, request.device
    if not checkpoint.read_progress(out.tuning / trainer.CHECKPOINT).best:
        return {}
    job = read_json(out.tuning / JOB)
    trained, progress, seconds = trainer.load_result(out.tuning, device)
    state = network.weights_of(trained)
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
        record["test"] = trainer.metrics_of(trained, dataset, dataset.test, device)
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
