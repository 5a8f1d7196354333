"""What a finetune is asked for: its options, checked, and what they name, opened."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pomona.backbone.spec import find_device
from pomona.backbone.weights import Weights, load_weights
from pomona.core.errors import MissingError, RequestError
from pomona.core.progress import OnTick, Tick
from pomona.finetune.recipe import Recipe, adapt
from pomona.photos.source import Source, open_source
from pomona.spark.session import Cluster
from pomona.workspace import layout
from pomona.workspace.layout import Out

DEFAULT_EPOCHS = 20.0  # where neither epochs nor minutes are given
NO_TEACHER = "none"
PRECISIONS = ("auto", "float32", "mixed")


@dataclass(frozen=True)
class FinetuneOptions:
    """How a backbone is trained; see ``pomona finetune --help``.

    ``judge_test`` and ``fold`` are for comparing recipes by cross-validation: each fold holds out
    other groups, and Test stays unseen.
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


def _check(options: FinetuneOptions) -> None:
    """Refuse values out of range, and to go on without PyTorch, before any work."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingError("finetune needs PyTorch: pip install 'pomona[torch]'") from error
    size, half, share = options.image_size, options.batch_size // 2, options.hold_out
    epochs, minutes = options.epochs, options.minutes
    precision, processes = options.precision, options.processes
    for holds, rule, value in (
        (32 <= size <= 512, "--image-size is 32 to 512 pixels", size),
        (epochs is None or 0 < epochs < 1e6, "--epochs is above 0", epochs),
        (minutes is None or 0 < minutes < 1e6, "--minutes is above 0", minutes),
        (half >= 1, "--batch-size is at least 2", options.batch_size),
        (0 <= share <= 0.5, "--hold-out is a share from 0 to 0.5", share),
        (options.seed >= 0, "--seed is at least 0", options.seed),
        (precision in PRECISIONS, f"--precision is {', '.join(PRECISIONS)}", precision),
        (1 <= processes <= half, f"--processes is 1 to half of --batch-size ({half})", processes),
    ):
        if not holds:
            raise RequestError(f"{rule}, not {f'{value:g}' if isinstance(value, float) else value}")


@dataclass(frozen=True)
class Request:
    """What was asked for, with everything that it names opened."""

    out: Out
    source: Source
    options: FinetuneOptions
    cluster: Cluster
    device: str
    start: Weights
    teacher: Weights | None
    on_tick: OnTick

    @property
    def tuned_on(self) -> set[str]:
        """Marks of the folders that start and teacher were trained on."""
        return {*self.start.tuned_on, *(self.teacher.tuned_on if self.teacher else ())}

    @property
    def epochs(self) -> float | None:
        """Epochs to train for; None where minutes alone limit it."""
        asked = self.options.epochs
        return DEFAULT_EPOCHS if asked is None and self.options.minutes is None else asked

    @property
    def recipe(self) -> Recipe:
        """How to train."""
        options, mixed = self.options, _mixed(self.options.precision, self.device)
        recipe = Recipe(options.image_size, options.batch_size, mixed=mixed, seed=options.seed)
        return adapt(recipe, self.start, self.teacher)

    def made_from(self, photos: pa.Table) -> dict[str, Any]:
        """Return everything that decides the result for these photos, but for the machine."""
        sha = hashlib.sha256()
        for batch in photos.to_batches():
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                sha.update(f"{row}\n".encode())
        settings = asdict(self.options) | {"epochs": self.epochs}
        del settings["start"], settings["teacher"]
        start, teacher = self.start, self.teacher
        return {
            "source": self.source.name,
            "photos": sha.hexdigest(),
            "from": {"name": start.name, "digest": start.digest},
            "teacher": teacher and {"name": teacher.name, "digest": teacher.digest},
            "settings": settings,
        }


def open_request(
    source: str | Path, out: str | Path, options: FinetuneOptions, cluster: Cluster, on_tick: OnTick
) -> Request:
    """Check options, and open the source, OUT and the weights."""
    _check(options)
    if options.processes > 1 and (cluster.master or "").startswith("sc://"):
        raise RequestError("--processes needs a Spark of its own: local[*] or spark://, not sc://")
    opened = open_source(source)
    if opened.kind == "hadoop":
        raise RequestError(f"{source}: finetune reads local folders, s3:// and gs://")
    device = find_device("torch", options.device)
    start = _load(options.start, "--from", on_tick)
    teacher = start if start.trained else None
    if options.teacher:
        named = options.teacher != NO_TEACHER
        teacher = _load(options.teacher, "--teacher", on_tick) if named else None
    folder = layout.open_out(out)
    if folder.root.is_relative_to(opened.root):
        raise RequestError(f"--out {out} lies inside the source: choose a folder outside it")
    return Request(folder, opened, options, cluster, device, start, teacher, on_tick)


def _load(name: str | None, option: str, on_tick: OnTick) -> Weights:
    weights = load_weights(name, lambda done, total: on_tick(Tick("weights", done, total)))
    if weights.state is None:
        raise RequestError(f"{option} {weights.name} is ONNX: training needs .safetensors or .pth")
    return weights


def _mixed(precision: str, device: str) -> bool:
    """Return whether to convolve in bfloat16: by default on a GPU that has it."""
    if precision != "auto" or device == "cpu":
        return precision == "mixed"
    import torch

    return bool(torch.cuda.is_bf16_supported(including_emulation=False))
