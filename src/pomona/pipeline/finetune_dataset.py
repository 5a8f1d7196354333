"""What fine-tuning trains on: a listing's photos, decoded into arrays, with labels and groups."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sized
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pomona.backbone.weights import mark
from pomona.core.errors import JobError, RequestError, SourceError
from pomona.core.files import write_json
from pomona.core.progress import Tick
from pomona.core.schema import SPLITS
from pomona.finetune.dataset import JOB, PHOTOS, ROWS, START, TEACHER, Codes
from pomona.photos import isolation
from pomona.photos.reading import read
from pomona.photos.source import folder_of
from pomona.pipeline.finetune_request import Request

HELD_OUT_PHOTOS = 1000
"""The most held-out photos that are evaluated: evaluations must not cost more than training."""


def prepare(request: Request, photos: pa.Table, made_from: dict[str, Any]) -> None:
    """Fill the run's folder with what training needs. The job's file comes last: all is there."""
    from safetensors.numpy import save_file

    began = time.monotonic()
    options, folder = request.options, request.out.tuning
    _check_labels(photos.filter(pc.equal(photos["split"], SPLITS[0]))["label"].unique())
    _check_space(request.out.root, photos.num_rows * options.image_size**2 * 4)
    folder.mkdir(parents=True)
    usable, rejected = _decode(request, photos)
    about, arrays = split(usable, request)
    save_file(arrays, folder / ROWS)
    for weights, name in ((request.start, START), (request.teacher, TEACHER)):
        if weights and weights.state:
            save_file(weights.state, folder / name)
    recipe = request.recipe
    steps_an_epoch = len(arrays["train"]) / recipe.batch_size
    seconds = options.minutes and options.minutes * 60
    job = {
        "made_from": made_from,
        "recipe": asdict(recipe),
        "steps": request.epochs and max(1, round(request.epochs * steps_an_epoch)),
        # Decoding is part of the time asked for, but training keeps at least half of it.
        "seconds": seconds and max(seconds / 2, seconds - (time.monotonic() - began)),
        "trained": request.start.trained,
        "device": request.device,
        "rejected": rejected,
        "photos": photos.num_rows,
    }
    write_json(folder / JOB, job | about)


def _decode(request: Request, photos: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """Write pixels and masks; return the usable photos, and the others' number by error code.

    Photos are decoded in a child process: one that crashes the decoder costs only itself.
    """
    from pomona.finetune.augmentation import foreground_masks

    total, side = photos.num_rows, request.options.image_size
    shape = (total, side, side, 4)
    pixels = np.lib.format.open_memmap(request.out.tuning / PHOTOS, "w+", np.uint8, shape)
    usable: list[int] = []
    rejected: Counter[str] = Counter()
    row = 0
    for batch in read(iter(photos.combine_chunks().to_batches(64)), request.source):
        start = len(usable)
        for content in batch["content"]:
            photo = isolation.decode_apart(content.as_py(), side)
            if photo.pixels is None:
                rejected[str(photo.error)] += 1
            else:
                pixels[len(usable), :, :, :3] = photo.pixels
                usable.append(row)
            row += 1
        written = pixels[start : len(usable)]
        written[..., 3] = foreground_masks(written[..., :3])
        request.on_tick(Tick("decode", row, total, rejected.total()))
    pixels.flush()
    if not usable:
        raise SourceError(f"none of the {total} photos of {request.source.name} can be used")
    return photos.take(pa.array(usable, pa.int64())), dict(rejected)


def split(photos: pa.Table, request: Request) -> tuple[dict[str, Any], dict[str, Codes]]:
    """Return what the job's file says of decoded photos, and their `Dataset` but for the pixels."""
    options = request.options
    names = np.array(photos["label"].to_pylist())
    folders = np.array([folder_of(path) for path in photos["path"].to_pylist()])
    training = np.array([name == SPLITS[0] for name in photos["split"].to_pylist()])
    labels = np.unique(names[training])
    _check_labels(labels)
    label_codes = _codes(labels, names)
    folder_codes = _codes(np.unique(folders), folders)
    rows = np.flatnonzero(training)
    chosen = hold_out(
        label_codes[rows], folder_codes[rows], options.hold_out, options.seed, options.fold
    )
    train, held_out = np.delete(rows, chosen), rows[chosen]
    test = np.flatnonzero(~training & (label_codes >= 0))
    # Groups to train on get the first codes: they are the classes of the network's second head.
    ordered = np.concatenate([np.unique(folders[part]) for part in (train, held_out, test)])
    group_codes = _codes(list(dict.fromkeys(ordered.tolist())), folders)
    evaluated = sample_by_group(held_out, group_codes, HELD_OUT_PHOTOS, options.seed)
    whole = sorted(set(folders[held_out]) - set(folders[train]))
    about = {
        "labels": labels.tolist(),
        "groups": np.unique(folders[rows]).tolist(),
        "by": "group" if whole else "photo",
        "held_out": whole,
        "weights_saw": not request.tuned_on.isdisjoint(map(mark, set(folders[held_out]))),
        "held_out_photos": len(evaluated),
        "tuned_on": sorted(map(mark, set(folders[train]))),
    }
    arrays = {"train": train, "held_out": evaluated, "test": test}
    return about, arrays | {"labels": label_codes, "groups": group_codes}


def _codes(classes: Iterable[str], values: Iterable[str]) -> Codes:
    """Return each value's place among the classes; −1 where it isn't one."""
    places = {name: place for place, name in enumerate(classes)}
    return np.array([places.get(value, -1) for value in values], np.int64)


def hold_out(labels: Codes, groups: Codes, share: float, seed: int, fold: int = 0) -> Codes:
    """Return the rows to hold out: whole groups where a label has two, else single photos.

    Each label's groups are shuffled, and every ``1 / share``-th from ``fold`` on is held out, but
    never all of them; with one group, its photos are treated so. With share 0 none are.
    """
    if not share:
        return np.zeros(0, np.int64)
    every = max(2, round(1 / share))
    rng = np.random.default_rng(seed)
    held_out: list[Codes] = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        shuffled = rng.permutation(np.unique(groups[rows]))
        if len(shuffled) > 1:
            start = fold % min(every, len(shuffled))
            held_out.append(rows[np.isin(groups[rows], shuffled[start::every])])
        else:
            held_out.append(rng.permutation(rows)[fold % every :: every][: len(rows) - 1])
    return np.sort(np.concatenate(held_out))


def sample_by_group(rows: Codes, groups: Codes, most: int, seed: int) -> Codes:
    """Return about ``most`` of the rows, or fewer: an equal number from each group."""
    rng = np.random.default_rng(seed)
    present = np.unique(groups[rows])
    each = max(1, most // max(1, len(present)))
    samples = [rng.permutation(rows[groups[rows] == group])[:each] for group in present]
    return np.sort(np.concatenate(samples)) if samples else rows


def _check_labels(labels: Sized) -> None:
    if len(labels) < 2:
        raise RequestError(
            f"training needs photos of two labels, and there is {len(labels)}: see --label, and "
            "pomona inspect"
        )


def _check_space(root: Path, pixels: int) -> None:
    """Refuse a full disk: writing into a file mapped on one ends the process without a message."""
    needed = pixels + (200 << 20)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise JobError(
            f"{root} has {free / 1e9:.1f} GB left, and finetune needs {needed / 1e9:.1f}: "
            "free some, choose another --out, or a smaller --image-size"
        )
