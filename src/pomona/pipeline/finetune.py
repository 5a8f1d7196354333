"""The stage ``finetune``: train the backbone on a source's own photos. Needs torch."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pomona.backbone import mobilenet
from pomona.backbone.spec import find_device
from pomona.backbone.weights import Weights, load_weights, mark, to_bytes
from pomona.core.errors import JobError, MismatchError, MissingError, RequestError, SourceError
from pomona.core.files import atomic_file, read_json, sha256, write_json
from pomona.core.progress import OnTick, Tick, quiet
from pomona.core.provenance import utc_now, versions
from pomona.core.schema import SPLITS
from pomona.finetune import recipe as rules
from pomona.finetune.recipe import Codes, Recipe
from pomona.photos import isolation
from pomona.photos.listing import list_files
from pomona.photos.reading import read
from pomona.photos.source import Source, arrange, folder_of, open_source
from pomona.spark import tasks
from pomona.spark.session import Cluster, session
from pomona.workspace import layout, tombstones
from pomona.workspace.layout import Out

EPOCHS = 20.0
"""Where neither epochs nor minutes are given."""

HELD_OUT_PHOTOS = 1000
"""Of them that are looked at, evenly by group: looks must not cost more than steps."""

NO_TEACHER = "none"
MODES = ("auto", "float32", "mixed")


@dataclass(frozen=True)
class FinetuneOptions:
    """How a backbone is trained; see ``pomona finetune --help``.

    ``judge_test`` and ``fold`` are for choosing a recipe: other groups are held out, and Test stays
    unseen.
    """

    start: str | None = None
    label: str = "parent"
    image_size: int = 224
    epochs: float | None = None
    minutes: float | None = None
    batch_size: int = 32
    device: str = "auto"
    precision: str = "auto"
    teacher: str | None = None
    test_fraction: float | None = None
    seed: int = 0
    hold_out: float = 0.2
    processes: int = 1
    judge_test: bool = True
    fold: int = 0


OPTIONS = tuple(FinetuneOptions.__dataclass_fields__)


def check(options: FinetuneOptions) -> None:
    """Refuse options that can't be, before any work."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingError("finetune needs PyTorch: pip install 'pomona[torch]'") from error
    if not 32 <= options.image_size <= 512:
        raise RequestError(f"--image-size is 32 to 512 pixels, not {options.image_size}")
    for name, value in (("--epochs", options.epochs), ("--minutes", options.minutes)):
        if value is not None and not 0 < value < 1e6:
            raise RequestError(f"{name} is above 0, not {value:g}")
    if options.batch_size < 2:
        raise RequestError(f"--batch-size is at least 2, not {options.batch_size}")
    if not 0 <= options.hold_out <= 0.5:
        raise RequestError(f"--hold-out is a share from 0 to 0.5, not {options.hold_out:g}")
    if options.seed < 0:
        raise RequestError(f"--seed is at least 0, not {options.seed}")
    if options.precision not in MODES:
        raise RequestError(f"--precision is {', '.join(MODES)}, not {options.precision}")
    if not 1 <= options.processes <= options.batch_size // 2:
        raise RequestError(
            f"--processes is 1 to half of --batch-size ({options.batch_size // 2}), not "
            f"{options.processes}"
        )


def finetune(
    source: str | Path,
    out: str | Path,
    options: FinetuneOptions | None = None,
    cluster: Cluster | None = None,
    on_tick: OnTick = quiet,
) -> dict[str, Any]:
    """Train weights on the photos of a source, and write them to ``OUT/weights.safetensors``.

    Killed, it goes on from its last checkpoint. Interrupted, it leaves the best weights so far.
    Nothing is computed if OUT holds the weights of the same photos and options.

    Returns
    -------
    dict
        The manifest's record, which is ``OUT/weights.json``, too.

    Raises
    ------
    RequestError
        And its kinds: what was asked for can't be.
    JobError
        If Spark gave up, with several processes. What is done is kept.
    """
    options = options or FinetuneOptions()
    check(options)
    cluster = cluster or Cluster()
    if options.processes > 1 and cluster.master.startswith("sc://"):
        raise RequestError("--processes needs a Spark of its own: local[*] or spark://, not sc://")
    where = open_source(source)
    if where.kind == "hadoop":
        raise RequestError(f"{source}: finetune reads local folders, s3:// and gs://")
    device = find_device("torch", options.device)
    start = _load(options.start, "--from", on_tick)
    teacher = start if start.trained else None
    if options.teacher:
        kept = options.teacher != NO_TEACHER
        teacher = _load(options.teacher, "--teacher", on_tick) if kept else None
    folder = layout.open_out(out)
    if folder.root.is_relative_to(where.root):
        raise RequestError(f"--out {out} lies inside the source: choose a folder outside it")
    with layout.lock(folder):
        tombstones.refuse_erasing(folder)
        on_tick(Tick("list"))
        listing = list_files(where, lambda count: on_tick(Tick("list", count)))
        photos = arrange(listing.files, options.label, options.test_fraction, root=where.folder)
        photos, _ = tombstones.leave_out(folder, photos)
        if not photos.num_rows:
            raise SourceError(f"{where.name} holds no photos to train on")
        made_from = _made_from(where.name, photos, options, start, teacher)
        job = Job(folder, where, options, cluster, device, start, teacher, on_tick)
        return job.run(photos, made_from)


def track(out: str | Path, record: dict[str, Any]) -> str:
    """Record a finetune in MLflow. Returns a sentence that tells where, or why not."""
    from pomona.registry import tracking

    folder = layout.open_out(out, must_exist=True)
    settings = record["made_from"]["settings"]
    params = {"source": record["made_from"]["source"], **settings, **record["recipe"]}
    params |= {name: (record["made_from"][name] or {}).get("name") for name in ("from", "teacher")}
    numbers = {"photos": record["photos"], "seconds": record["times"]["seconds"]}
    for part in ("held_out", "test"):
        numbers |= {f"{part}_{k}": v for k, v in record[part].items() if isinstance(v, float)}
    curves = {
        name: [(look["step"], look[name]) for look in record["history"] if name in look]
        for name in ("training_loss", "loss", "accuracy", "accuracy_by_group")
    }
    files = [folder.tuned, folder.tuned_about]
    return tracking.record(folder, params, numbers, files, curves)


def _load(name: str | None, option: str, on_tick: OnTick) -> Weights:
    found = load_weights(name, lambda done, total: on_tick(Tick("weights", done, total)))
    if found.state is None:
        raise RequestError(f"{option} {found.name} is ONNX: training needs .safetensors or .pth")
    return found


def _made_from(
    name: str, photos: pa.Table, options: FinetuneOptions, start: Weights, teacher: Weights | None
) -> dict[str, Any]:
    """Return what decides the result, but for the machine."""
    sha = hashlib.sha256()
    for batch in photos.to_batches():
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            sha.update(f"{row}\n".encode())
    settings = {k: v for k, v in asdict(options).items() if k not in ("start", "teacher")}
    if options.epochs is None and options.minutes is None:
        settings["epochs"] = EPOCHS
    return {
        "source": name,
        "photos": sha.hexdigest(),
        "from": {"name": start.name, "digest": start.digest},
        "teacher": teacher and {"name": teacher.name, "digest": teacher.digest},
        "settings": settings,
    }


def recipe_for(
    options: FinetuneOptions, start: Weights, teacher: Weights | None, device: str
) -> Recipe:
    """Return the recipe: the one for weights that are trained already, or for a random start."""
    found = Recipe(
        image_size=options.image_size,
        batch_size=options.batch_size,
        seed=options.seed,
        mixed=_mixed(options.precision, device),
        distill=ANCHOR if teacher else 0.0,
    )
    if not start.trained:
        return replace(found, **FROM_RANDOM, **(FROM_TEACHER if teacher else {}))
    another = teacher is not None and teacher.digest != start.digest
    return found if another else replace(found, blend=BLEND)


ANCHOR = 1.0
"""Of trained weights, to the teacher that they are themselves: they stay general."""

BLEND = 0.8
"""Of trained weights, unless another network is to be matched."""

FROM_TEACHER: dict[str, Any] = {"distill": 5.0, "apart": 0.6}
"""A random start learns most of what it knows from the teacher, at first block by block."""

FROM_RANDOM: dict[str, Any] = {
    "norm": True,
    "rate": 2e-3,
    "head_rate": 2e-3,
    "decay": 5e-2,
    "average": 0.05,
    "variety": 0.5,
}
"""A random start needs batch norms that follow the batch, and bears larger steps."""


def _mixed(precision: str, device: str) -> bool:
    if precision != "auto":
        return precision == "mixed"
    if device == "cpu":
        return False
    import torch

    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


# --- the job -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What the steps of one finetune share."""

    out: Out
    source: Source
    options: FinetuneOptions
    cluster: Cluster
    device: str
    start: Weights
    teacher: Weights | None
    on_tick: OnTick

    @property
    def folder(self) -> Path:
        """The run under way."""
        return self.out.tuning

    def run(self, photos: pa.Table, made_from: dict[str, Any]) -> dict[str, Any]:
        """Do what isn't done yet. Returns the record."""
        old = read_json(self.out.tuned_about)
        if old.get("finished") and self._is_whole(old):
            if old["made_from"] == made_from:
                return old
            raise MismatchError(
                f"{self.out.root} holds weights that were made with other "
                f"{_differences(made_from, old['made_from'])}: choose another --out, or remove "
                f"{self.out.tuned}"
            )
        self._refuse_other(made_from)
        began = time.monotonic()
        if not (self.folder / "job.json").exists():
            self._prepare(photos, made_from, began)
        try:
            self._train()
        except KeyboardInterrupt:
            self._write(made_from, finished=False)
            raise
        record = self._write(made_from, finished=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        return record

    def _is_whole(self, record: dict[str, Any]) -> bool:
        place = self.out.tuned
        return place.exists() and sha256(place) == record["digests"][place.name]

    def _refuse_other(self, made_from: dict[str, Any]) -> None:
        under_way = read_json(self.folder / "job.json").get("made_from")
        if under_way is None:
            shutil.rmtree(self.folder, ignore_errors=True)  # it was killed before it began
        elif under_way != made_from:
            raise MismatchError(
                f"{self.out.root} holds a finetune that isn't finished, with other "
                f"{_differences(made_from, under_way)}: give the same command to go on, choose "
                f"another --out, or remove {self.folder}"
            )

    def _prepare(self, photos: pa.Table, made_from: dict[str, Any], began: float) -> None:
        """Write everything that training needs into its folder; ``job.json`` comes last."""
        from safetensors.numpy import save_file

        training = pc.equal(photos["split"], SPLITS[0])
        _check_labels(photos.filter(training)["label"].unique().to_pylist())
        self._check_space(photos.num_rows)
        self.folder.mkdir(parents=True)
        kept, codes = self._decode(photos)
        about, data = _arrange(kept, self.options, self._known())
        save_file(data, self.folder / "rows.safetensors")
        assert self.start.state is not None
        save_file(self.start.state, self.folder / "start.safetensors")
        if self.teacher is not None and self.teacher.state is not None:
            save_file(self.teacher.state, self.folder / "teacher.safetensors")
        options = self.options
        recipe = recipe_for(options, self.start, self.teacher, self.device)
        epochs = EPOCHS if options.epochs is None and options.minutes is None else options.epochs
        a_pass = len(data["train"]) / recipe.batch_size
        seconds = options.minutes and options.minutes * 60
        # Decoding is part of the time that there is, but training keeps at least half of it.
        left = seconds and max(seconds / 2, seconds - (time.monotonic() - began))
        write_json(
            self.folder / "job.json",
            {
                "made_from": made_from,
                "recipe": asdict(recipe),
                "steps": epochs and max(1, round(epochs * a_pass)),
                "seconds": left,
                "trained": self.start.trained,
                "device": self.device,
                "rejected": codes,
                "photos": photos.num_rows,
                **about,
            },
        )

    def _known(self) -> set[str]:
        """Return the marks of the folders that start and teacher were tuned on."""
        teacher = self.teacher.tuned_on if self.teacher else ()
        return {*self.start.tuned_on, *teacher}

    def _check_space(self, count: int) -> None:
        """Refuse a disk that can't take the pixels: writing into a mapping dies without a word."""
        needed = count * self.options.image_size**2 * 4 + (200 << 20)
        free = shutil.disk_usage(self.out.root).free
        if free < needed:
            raise JobError(
                f"{self.out.root} has {free / 1e9:.1f} GB left, and finetune needs "
                f"{needed / 1e9:.1f}: free some, choose another --out, or a smaller --image-size"
            )

    def _decode(self, photos: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        """Write pixels and masks; return the photos that could be used, and the others' codes.

        Each photo is decoded in a child process: one that ends the decoder costs only itself.
        """
        from pomona.finetune import augmentation

        total, side = photos.num_rows, self.options.image_size
        shape = (total, side, side, 4)
        place = self.folder / "photos.npy"
        pixels = np.lib.format.open_memmap(place, "w+", np.uint8, shape)
        good: list[int] = []
        codes: Counter[str] = Counter()
        row = 0
        for batch in read(_batches(photos), self.source):
            start = len(good)
            for content in batch["content"]:
                photo = isolation.decode_apart(content.as_py(), side)
                if photo.pixels is None:
                    codes[str(photo.error)] += 1
                else:
                    pixels[len(good), :, :, :3] = photo.pixels
                    good.append(row)
                row += 1
            some = pixels[start : len(good)]
            some[..., 3] = augmentation.cut_out(some[..., :3])
            self.on_tick(Tick("decode", row, total, sum(codes.values())))
        pixels.flush()
        if not good:
            raise SourceError(f"none of the {total} photos of {self.source.name} can be used")
        return photos.take(pa.array(good, pa.int64())), dict(codes)

    def _train(self) -> None:
        """Train in this process, or in several that Spark starts."""
        from pomona.finetune import trainer

        def on_step(run: trainer.Run) -> None:
            self._tell(trainer.progress_of(run))

        if self.options.processes == 1:
            trainer.train(self.folder, self.device, on_step=on_step)
            return
        told, stop = self.folder / "progress.json", self.folder / trainer.STOP
        stop.unlink(missing_ok=True)
        cluster = replace(self.cluster, log_file=self.out.log)
        with session(cluster) as spark, _left_behind(stop):
            tasks.run_torch(
                spark,
                self.options.processes,
                self.device == "cuda",
                trainer.train_together,
                str(self.folder),
                poll=lambda: self._tell(read_json(told)),
                log_file=self.out.log,
            )
        if not trainer.told(self.folder).get("ended"):
            raise JobError(
                "the processes ended before the training did: run the same command again"
            )

    def _tell(self, progress: dict[str, Any]) -> None:
        if progress:
            self.on_tick(Tick("finetune", progress["done"], progress["total"]))

    def _write(self, made_from: dict[str, Any], *, finished: bool) -> dict[str, Any]:
        """Write the best weights so far, if there are any, and the JSON beside them."""
        from pomona.finetune import trainer
        from pomona.finetune.network import weights_of

        if not trainer.told(self.folder).get("best"):
            return {}
        job = read_json(self.folder / "job.json")
        network, progress, seconds = trainer.result(self.folder, self.device)
        state = weights_of(network.state_dict(), norm=network.norm)
        with atomic_file(self.out.tuned) as part:
            part.write_bytes(to_bytes(state, (*self._known(), *job["tuned_on"])))
        record = {
            "made_from": made_from,
            "finished": finished,
            "recipe": job["recipe"],
            "photos": job["photos"],
            "rejected": job["rejected"],
            "labels": job["labels"],
            "groups": len(job["groups"]),
            "held_out": {
                "by": job["by"],
                "photos": job["held_out_photos"],
                "groups": job["held_out"],
                "weights_saw": job["weights_saw"],
                "before": progress.before,
                **progress.best,
            },
            "test": {},
            "ended": progress.ended or "interrupted",
            "history": progress.history,
            "digests": {
                self.out.tuned.name: sha256(self.out.tuned),
                "weights": mobilenet.digest(state),
            },
            "versions": versions(),
            "device": self.device,
            "times": {
                "finished": utc_now(),
                "seconds": round(seconds, 1),
            },
        }
        if finished and self.options.judge_test:
            record["test"] = trainer.judge_test(self.folder, network, self.device)
        write_json(self.out.tuned_about, record)
        layout.update(self.out, "finetune", {k: v for k, v in record.items() if k != "history"})
        return record


def _differences(made_from: dict[str, Any], other: dict[str, Any]) -> str:
    return " and ".join(name for name in made_from if made_from[name] != other.get(name))


@contextlib.contextmanager
def _left_behind(stop: Path) -> Iterator[None]:
    """Leave a file if the block doesn't end well."""
    try:
        yield
    except BaseException:
        stop.touch()
        raise


def _check_labels(labels: list[str]) -> None:
    if len(labels) < 2:
        raise RequestError(
            f"training needs photos of two labels, and there is {len(labels)}: see --label, and "
            "pomona inspect"
        )


def _batches(photos: pa.Table) -> Iterator[pa.RecordBatch]:
    yield from photos.combine_chunks().to_batches(max_chunksize=64)


def _arrange(
    photos: pa.Table, options: FinetuneOptions, known: set[str]
) -> tuple[dict[str, Any], dict[str, Codes]]:
    """Return what is known about the photos, and the codes that training works with.

    Groups that are trained on come first, then those that are held out, then those of Test: the
    network's second question is about the first only.
    """
    names = np.array(photos["label"].to_pylist())
    folders = np.array([folder_of(path) for path in photos["path"].to_pylist()])
    training = np.array([split == SPLITS[0] for split in photos["split"].to_pylist()])
    labels = np.unique(names[training])
    _check_labels(labels.tolist())
    places = np.searchsorted(labels, names).clip(max=len(labels) - 1)
    label = np.where(labels[places] == names, places, -1)
    rows = np.flatnonzero(training)
    _, group = np.unique(folders, return_inverse=True)
    out = rows[
        rules.hold_out(label[rows], group[rows], options.hold_out, options.seed, options.fold)
    ]
    train = np.setdiff1d(rows, out)
    test = np.flatnonzero(~training & (label >= 0))
    kinds = list(dict.fromkeys(np.concatenate([np.sort(folders[r]) for r in (train, out, test)])))
    code = {str(name): number for number, name in enumerate(kinds)}
    groups = np.array([code.get(str(name), -1) for name in folders])
    whole = sorted(set(folders[out].tolist()) - set(folders[train].tolist()))
    looked_at = rules.thin(out, groups, HELD_OUT_PHOTOS, options.seed)
    about = {
        "labels": labels.tolist(),
        "groups": sorted(set(folders[rows].tolist())),
        "by": "group" if whole else "photo",
        "held_out": whole,
        "weights_saw": any(mark(folder) in known for folder in set(folders[out].tolist())),
        "held_out_photos": len(looked_at),
        "tuned_on": sorted({mark(folder) for folder in folders[train]}),
    }
    codes = {"labels": label, "groups": groups, "train": train, "held_out": looked_at, "test": test}
    return about, {name: value.astype(np.int64) for name, value in codes.items()}
