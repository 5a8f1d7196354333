"""The stage ``train``: from ``OUT/training_pca`` to ``OUT/model`` and its metrics."""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pomona.core.errors import MismatchError, RequestError
from pomona.core.files import FORMAT, read_json, sha256, write_json
from pomona.core.progress import OnTick, Tick, quiet
from pomona.core.provenance import utc_now, versions
from pomona.model import artifact, metrics, unknown
from pomona.model import classifier as cls
from pomona.model import projection as proj
from pomona.model.classifier import Classifier, Codes
from pomona.model.evaluation import calibration, headline, judge_leakage, judge_test
from pomona.model.head import Head, make_head
from pomona.model.metrics import Flags
from pomona.model.pca_table import MAX_ROWS, Photos, groups_of, new_to, read_photos
from pomona.model.unknown import Detector
from pomona.workspace import feature_table, layout
from pomona.workspace.layout import Out

RECIPE = 1
"""Raise it when the same rows and options would give another model: then old ones are remade."""
SEARCH_ROWS = 50_000
"""Rows on which C is chosen and calibration is done: more change neither, and cost hours."""
FEWEST_NEW = 40
"""Photos, of two labels, that tuned weights never saw: on fewer nothing can be chosen."""


@dataclass(frozen=True)
class TrainOptions:
    """How a classifier is made; see ``pomona train --help``."""

    class_weight: str = "none"
    max_rows: int = MAX_ROWS
    unknown: str = "auto"
    keep: float = 0.95


def check(options: TrainOptions) -> None:
    """Refuse options that can't be, before any work."""
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
        made_from = {
            "digests": {name: reduced["digests"][name] for name in _INPUTS},
            "label": read_json(folder.table_file)["label"],
            "settings": options.__dict__,
            "recipe": RECIPE,
        }
        tuned_on = read_json(folder.table_file).get("tuned_on")
        if tuned_on:
            made_from["tuned_on"] = hashlib.sha256(" ".join(tuned_on).encode()).hexdigest()
        old = read_json(folder.manifest).get("stages", {}).get("train", {})
        if old.get("made_from") == made_from and _is_whole(folder, old):
            return dict(old)
        return _train(folder, options, made_from, tuned_on or [], on_tick)


_INPUTS = ("training_pca", "test_pca", "projection.safetensors")


def _reduced(out: Out) -> dict[str, Any]:
    stages = read_json(out.manifest).get("stages", {})
    found = stages.get("reduce")
    if not found:
        raise RequestError(f"there are no PCA features in {out.root}: pomona reduce makes them")
    if found["made_from"]["features"] != feature_table.digest(out):
        raise RequestError(
            f"the PCA features in {out.root} are older than the features: run pomona reduce again"
        )
    return dict(found)


def _is_whole(out: Out, record: dict[str, Any]) -> bool:
    try:
        found = artifact.load_model(out.model)
    except RequestError:
        return False
    return found.about["digests"] == record["digests"] and out.metrics.exists()


class Steps:
    """Count the steps of a training as ticks."""

    def __init__(self, on_tick: OnTick, total: int) -> None:
        self.on_tick, self.total, self.done = on_tick, total, -1
        self()

    def __call__(self) -> None:
        """Note that a step is done."""
        self.done = min(self.done + 1, self.total)
        self.on_tick(Tick("train", self.done, self.total))


def _train(
    out: Out,
    options: TrainOptions,
    made_from: dict[str, Any],
    tuned_on: list[str],
    on_tick: OnTick,
) -> dict[str, Any]:
    start = time.time()
    photos = read_photos(out, "training_pca", options.max_rows)
    labels, y = cls.encode(photos.labels.tolist())
    groups = cls.usable_groups(y, groups_of(photos) if made_from["label"] == "top" else None)
    steps = Steps(on_tick, len(cls.STRENGTHS) + len(unknown.left_out(y)) + 4)
    figures: dict[str, Any] = {"photos": len(y), "photos_in_table": photos.of, "labels": labels}
    with cls.one_thread_each():
        new = new_to(photos, tuned_on)
        fitted, searched = _fit(photos, y, labels, groups, new, options, steps)
    figures |= searched
    seconds = {"fit": time.time() - start}
    projection = proj.load_projection(out.projection)
    head = make_head(projection, *fitted)
    steps()
    figures["test"], test_right = judge_test(
        out, head, options.max_rows, tuned_on, by_group=groups is not None
    )
    steps()
    figures["leakage"] = judge_leakage(out, test_right, steps)
    seconds["evaluate"] = time.time() - start - seconds["fit"]
    record = _write(out, head, figures, made_from, seconds)
    steps.done = steps.total - 1
    steps()
    return record


# --- fitting -----------------------------------------------------------------------------------


def _fit(
    photos: Photos,
    y: Codes,
    labels: tuple[str, ...],
    groups: Codes | None,
    new: Flags,
    options: TrainOptions,
    steps: Steps,
) -> tuple[tuple[Classifier, Detector], dict[str, Any]]:
    """Choose C, temperature and detector on held-out photos, then fit on all of them."""
    some = np.arange(len(y))
    if len(y) > SEARCH_ROWS:
        some = np.sort(np.random.default_rng(cls.SEED).permutation(len(y))[:SEARCH_ROWS])
    z, ys, gs = photos.z[some], y[some], None if groups is None else groups[some]
    fresh, every = new[some], cls.folds(ys, gs)
    cut = _by_new(every, ys, fresh)
    tuned = not fresh.all()
    saw = tuned and cut is every
    kinds = y if groups is None or tuned else groups
    figures: dict[str, Any] = {
        "search": [],
        "cross_validation": None,
        "class_weight": options.class_weight,
    }
    strength, temperature = 1e-2, 1.0
    if cut:
        best = _best(z, ys, labels, cut, options, steps, figures["search"])
        strength = best.strength
        temperature = cls.temperature(best.logits, ys[best.rows])
        units = best.rows if gs is None else gs[best.rows]
        figures["cross_validation"] = {
            "by": "photo" if gs is None else "group",
            "folds": len(cut),
            "not_judged": (len(ys) if cut is every else int(fresh.sum())) - len(best.rows),
            "weights_saw": saw,
            **metrics.measure(cls.softmax(best.logits / temperature), ys[best.rows], units),
            **calibration(best.logits, temperature, ys[best.rows]),
        }
    how = {
        "strength": strength,
        "class_weight": options.class_weight,
        "temperature": temperature,
    }
    sample = (z, ys, kinds[some])
    compared = unknown.compare(sample, gs, labels, steps, **how)
    # To weights that were tuned on a group it is no stranger, but far from all others: groups that
    # are held out would put the threshold where nothing is unknown (docs/log.md).
    best_method = unknown.DEFAULT if saw else _best_method(compared)
    method = options.unknown if options.unknown != "auto" else best_method
    known = unknown.held_out(method, sample, cls.folds(ys, None) if saw else cut, labels, **how)
    limit = unknown.threshold(known, options.keep)
    found = cls.calibrated(
        cls.fit(photos.z, y, labels, strength, options.class_weight), temperature
    )
    detector = unknown.make(method, photos.z, kinds)
    if not len(known):  # nothing could be held out: then nothing is called unknown
        limit = float(np.finfo(np.float32).min)
    detector = replace(detector, threshold=limit)
    figures |= {
        "strength": strength,
        "temperature": temperature,
        "unknown": {
            "method": method,
            "threshold": limit,
            "keep": options.keep,
            "weights_saw": tuned,
            **compared,
        },
    }
    return (found, detector), figures


def _by_new(cut: list[cls.Fold], y: Codes, new: Flags) -> list[cls.Fold]:
    """Leave only photos to judge that the weights never saw: they say how well new ones fare.

    Returns all of them where there are too few such photos to choose anything on.
    """
    if new.all():
        return cut
    found = [(fit, held[new[held]]) for fit, held in cut]
    found = [fold for fold in found if len(fold[1])]
    rows = np.concatenate([cls.judged(y, fold) for fold in found]) if found else np.zeros(0, int)
    enough = len(rows) >= FEWEST_NEW and len(np.unique(y[rows])) > 1
    return found if enough else cut


def _best(
    z: npt.NDArray[np.float32],
    y: Codes,
    labels: tuple[str, ...],
    cut: list[cls.Fold],
    options: TrainOptions,
    steps: Steps,
    told: list[dict[str, float]],
) -> cls.Trial:
    """Return the trial with the highest accuracy; of equal ones the most regularised."""
    best: cls.Trial | None = None
    for trial in cls.search(z, y, labels, cut, options.class_weight, steps):
        told.append({"strength": trial.strength, "accuracy": trial.accuracy})
        if best is None or trial.accuracy > best.accuracy:
            best = trial
    assert best is not None
    return best


def _best_method(compared: dict[str, Any]) -> str:
    if not compared:
        return unknown.DEFAULT
    areas: dict[str, float] = compared["auroc"]
    return max(areas, key=lambda name: areas[name])


# --- writing -----------------------------------------------------------------------------------


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
    about = {
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
            "features": feature_table.digest(out),  # by it `forget` knows the models of a photo
        },
    }
    artifact.save_model(staged / "model", backbone_file(out, table), head, about)
    write_json(staged / "metrics.json", {"format": FORMAT, **figures})
    here = f"_work/{staged.name}"
    layout.commit(
        out,
        [
            (f"{here}/model", "model"),
            (f"{here}/metrics.json", "report/metrics.json"),
            (None, "report/report.html"),  # of another model
        ],
    )
    shutil.rmtree(out.work, ignore_errors=True)
    record = {
        "made_from": made_from,
        "photos": figures["photos"],
        "labels": len(figures["labels"]),
        "strength": figures["strength"],
        "temperature": figures["temperature"],
        "unknown": {name: figures["unknown"][name] for name in ("method", "threshold", "keep")},
        "metrics": headline(figures),
        "digests": artifact.load_model(out.model).about["digests"],
        "times": {
            "finished": utc_now(),
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
        },
    }
    layout.update(out, "train", record)
    return record


def backbone_file(out: Out, table: dict[str, Any]) -> bytes:
    """Return the ONNX file of the network that made the features.

    Raises
    ------
    MismatchError
        If it is missing, or is of other weights.
    """
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
