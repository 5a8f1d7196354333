"""The stage ``train``: from ``OUT/training_pca`` to ``OUT/model`` and its metrics."""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomona.core.errors import MismatchError, RequestError
from pomona.core.files import FORMAT, read_json, sha256, write_json
from pomona.core.progress import OnTick, Steps, quiet
from pomona.core.provenance import utc_now, versions
from pomona.model import artifact, selection, unknown
from pomona.model import classifier as cls
from pomona.model.evaluation import headline, judge_leakage, judge_test
from pomona.model.head import Head, make_head
from pomona.model.pca_table import MAX_ROWS, groups_of, read_photos, unseen_by
from pomona.model.projection import load_projection
from pomona.model.sampling import Sample, usable_groups
from pomona.pipeline.status import stale_stages
from pomona.workspace import feature_table, layout
from pomona.workspace.layout import Move, Out

RECIPE = 1
"""Raise it when the same rows and options would give another model: then old ones are remade."""


@dataclass(frozen=True)
class TrainOptions:
    """How a classifier is made; see ``pomona train --help``."""

    class_weight: str = "none"
    max_rows: int = MAX_ROWS
    unknown: str = "auto"
    keep: float = 0.95


def check(options: TrainOptions) -> None:
    """Refuse impossible options before any work is done."""
    cls.check_sklearn()
    if options.class_weight not in ("none", "balanced"):
        raise RequestError(f"--class-weight is none or balanced, not {options.class_weight}")
    if options.max_rows < 2:
        raise RequestError(f"--max-rows is at least 2, not {options.max_rows}")
    if options.unknown not in ("auto", *unknown.METHODS):
        raise RequestError(
            f"--unknown is auto or one of {', '.join(unknown.METHODS)}, not {options.unknown}"
        )
    if not 0 < options.keep < 1:
        raise RequestError(f"--keep is a share between 0 and 1, not {options.keep:g}")


def train(
    out: str | Path, options: TrainOptions | None = None, on_tick: OnTick = quiet
) -> dict[str, Any]:
    """Train, calibrate, evaluate and write ``OUT/model``. Returns the manifest's record.

    Runs on the driver, without Spark. Nothing is computed if the PCA features and the options are
    those of the model that is there.

    Raises
    ------
    RequestError
        And its kinds: there are no PCA features, fewer than two labels, or numbers that aren't
        finite.
    """
    options = options or TrainOptions()
    check(options)
    folder = layout.open_out(out, must_exist=True)
    with layout.lock(folder):
        reduced = _reduced(folder)
        table = read_json(folder.table_file)
        made_from = {
            "digests": {name: reduced["digests"][name] for name in _INPUTS},
            "label": table["label"],
            "settings": options.__dict__,
            "recipe": RECIPE,
        }
        if tuned_on := table.get("tuned_on") or []:
            made_from["tuned_on"] = hashlib.sha256(" ".join(tuned_on).encode()).hexdigest()
        old = read_json(folder.manifest).get("stages", {}).get("train", {})
        if old.get("made_from") == made_from and _is_whole(folder, old):
            return dict(old)
        return _train(folder, options, made_from, tuned_on, on_tick)


_INPUTS = ("training_pca", "test_pca", "projection.safetensors")


def _reduced(out: Out) -> dict[str, Any]:
    stages: dict[str, dict[str, Any]] = read_json(out.manifest).get("stages", {})
    if "reduce" not in stages:
        raise RequestError(f"there are no PCA features in {out.root}: pomona reduce makes them")
    if "reduce" in stale_stages(out, stages):
        raise RequestError(
            f"the PCA features in {out.root} are older than the features: run pomona reduce again"
        )
    return stages["reduce"]


def _is_whole(out: Out, record: dict[str, Any]) -> bool:
    try:
        model = artifact.load_model(out.model)
    except RequestError:
        return False
    return bool(model.about["digests"] == record["digests"]) and out.metrics.exists()


def _train(
    out: Out, options: TrainOptions, made_from: dict[str, Any], tuned_on: list[str], on_tick: OnTick
) -> dict[str, Any]:
    start = time.time()
    photos = read_photos(out, "training_pca", options.max_rows)
    labels, y = cls.encode(photos.labels.tolist())
    groups = usable_groups(y, groups_of(photos) if made_from["label"] == "top" else None)
    sample = Sample(photos.z, y, labels, groups, unseen_by(photos, tuned_on))
    steps = Steps(on_tick, "train", len(cls.STRENGTHS) + len(unknown.left_out(y)) + 4)
    figures: dict[str, Any] = {"photos": len(y), "photos_in_table": photos.of, "labels": labels}
    with cls.one_thread_each():
        classifier, detector, chosen = selection.select_and_fit(
            sample, options.class_weight, options.unknown, options.keep, steps
        )
    figures |= chosen
    seconds = {"fit": time.time() - start}
    head = make_head(load_projection(out.projection), classifier, detector)
    steps()
    by_group = groups is not None
    figures["test"], right = judge_test(out, head, options.max_rows, tuned_on, by_group=by_group)
    steps()
    figures["leakage"] = judge_leakage(out, right, steps)
    seconds["evaluate"] = time.time() - start - seconds["fit"]
    record = _write(out, head, figures, made_from, seconds)
    steps(steps.total)  # also those that were left out because there was nothing to hold out
    return record


def _write(
    out: Out,
    head: Head,
    figures: dict[str, Any],
    made_from: dict[str, Any],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Write model and metrics, whole or not at all, and the record."""
    staged = out.work / f"train-{feature_table.new_run()}"
    table = read_json(out.table_file)
    about = _about(out, table, figures, made_from)
    artifact.save_model(staged / "model", backbone_file(out, table), head, about)
    write_json(staged / "metrics.json", {"format": FORMAT, **figures})
    moves: list[Move] = [
        (f"_work/{staged.name}/model", "model"),
        (f"_work/{staged.name}/metrics.json", "report/metrics.json"),
        (None, "report/report.html"),  # of another model
    ]
    layout.commit(out, moves)
    shutil.rmtree(out.work, ignore_errors=True)
    record = {
        "made_from": made_from,
        "photos": figures["photos"],
        "labels": len(figures["labels"]),
        "strength": figures["strength"],
        "temperature": figures["temperature"],
        "unknown": {name: figures["unknown"][name] for name in ("method", "threshold", "keep")},
        "metrics": about["metrics"],
        "digests": artifact.load_model(out.model).about["digests"],
        "times": {
            "finished": utc_now(),
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
        },
    }
    layout.update(out, "train", record)
    return record


def _about(
    out: Out, table: dict[str, Any], figures: dict[str, Any], made_from: dict[str, Any]
) -> dict[str, Any]:
    """Return what ``model.json`` says beside what `pomona.model.artifact` adds."""
    return {
        "pomona": versions().get("pomona"),
        "weights": {
            "name": table["weights"],
            "digest": table["spec"]["weights_digest"],
            "trained": not table["weights"].startswith("random:"),
        },
        "preprocessing": table["spec"]["preprocessing"],
        "made_from": made_from,
        "strength": figures["strength"],
        "unknown": figures["unknown"],
        "metrics": headline(figures),
        "trained_on": {
            "source": Path(table["source"]).name,
            "photos": figures["photos"],
            "label": table["label"],
            "features": feature_table.digest(out),  # tells `forget` which models saw a photo
        },
    }


def backbone_file(out: Out, table: dict[str, Any]) -> bytes:
    """Return the ONNX file of the network that made the features, or raise MismatchError."""
    import onnx

    if not out.backbone.exists():
        raise MismatchError(
            f"{out.backbone} is missing: run the same pomona extract again, it computes nothing"
        )
    content = out.backbone.read_bytes()
    if sha256(out.backbone) == table["spec"]["weights_digest"]:  # weights given as ONNX
        return content
    try:
        props = onnx.load_from_string(content).metadata_props
    except Exception as error:
        raise MismatchError(f"{out.backbone} is damaged: remove it and extract again") from error
    if {p.key: p.value for p in props}.get("weights_digest") != table["spec"]["weights_digest"]:
        raise MismatchError(f"{out.backbone} is of other weights: remove it and extract again")
    return content
