"""The stage ``export``: from ``OUT/model`` to the phone's files, each judged on held-out photos.

``phone.onnx`` is the model without the outputs that only Pomona needs. ``phone-half.onnx`` and
``phone-int8.onnx`` are smaller, and are there only if they passed
`pomona.export.quantization.judge`. ``export.json`` says what a program needs to use them: the
folder stands for itself. With `web` the page that recognises fruit is written too, with the
smallest file of these.
"""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pomona.backbone import mobilenet
from pomona.backbone.session import onnx_session
from pomona.core.errors import MissingError, RequestError, SourceError
from pomona.core.files import atomic_folder, read_json, write_json
from pomona.core.progress import OnTick, Tick, quiet
from pomona.core.provenance import versions
from pomona.core.uris import local_path
from pomona.export import quantization
from pomona.export.quantization import Codes, Pixels
from pomona.model import artifact
from pomona.model.artifact import Model
from pomona.model.head import ANSWER
from pomona.photos import decoding
from pomona.photos.reading import Reader, reader
from pomona.photos.source import open_source
from pomona.web import page
from pomona.workspace import feature_table, layout
from pomona.workspace.layout import Out

FORMAT = 1
"""Of the folder. Raise it when a reader of the old one would be wrong."""

PHONE, HALF, INT8 = "phone.onnx", "phone-half.onnx", "phone-int8.onnx"
ABOUT = "export.json"

ENOUGH = 100
"""Test photos of known labels that make a judge; with fewer, Training photos are held out."""
READ_AT_ONCE = 64


@dataclass(frozen=True)
class ExportOptions:
    """What is exported; see ``pomona export --help``.

    Attributes
    ----------
    dest
        The folder; None: ``OUT/export``.
    web
        The folder for the page as static files; None: no page.
    calibration, held_out
        How many photos, at most, evenly spread over those that there are.
    """

    int8: bool = False
    half: bool = False
    dest: str | None = None
    calibration: int = 256
    held_out: int = 2000
    web: str | None = None


def export(
    out: str | Path, options: ExportOptions | None = None, on_tick: OnTick = quiet
) -> dict[str, Any]:
    """Write the phone's files. Returns what ``export.json`` holds, and the ``folder``.

    Runs on the driver, without Spark. Whatever was asked for and didn't pass is not written; the
    rest is, and `export.json` has the figures of all.

    Raises
    ------
    RequestError
        And its kinds: there is no model; the photos are gone; a variant that was asked for didn't
        pass (the figures are in the line).
    """
    options = options or ExportOptions()
    if min(options.calibration, options.held_out) < 1:
        raise RequestError("export calibrates on and is judged by at least one photo each")
    folder = layout.open_out(out, must_exist=True)
    dest = local_path(options.dest) if options.dest else folder.root / "export"
    _refuse_foreign(dest)
    web = _page_folder(options, dest)
    with layout.lock(folder):
        found = artifact.load_model(folder.model)
        files, judged = _make(folder, found, options, on_tick)
        about = _about(found, files, judged)
        _write(folder, dest, files, about)
        if web:
            smallest = min(files, key=lambda name: len(files[name]))
            page.write(web, page.site(found, files[smallest], service=False))
            about |= {"web": {"folder": str(web), "file": smallest}}
    refused = [line for line in (_refusal(kind, about) for kind in ("half", "int8")) if line]
    if refused:
        raise RequestError("; ".join([*refused, f"the rest is in {dest}"]))
    return {**about, "folder": str(dest)}


def _refuse_foreign(dest: Path) -> None:
    if dest.exists() and not dest.is_dir():
        raise RequestError(f"{dest} is a file: --dest is a folder")
    if dest.is_dir() and any(dest.iterdir()) and not (dest / ABOUT).exists():
        raise RequestError(f"{dest} holds other files than an export's: choose a new folder")


def _page_folder(options: ExportOptions, dest: Path) -> Path | None:
    """Return where the page goes. What it lacks is said before any work is done."""
    if options.web is None:
        return None
    web = local_path(options.web)
    if web == dest or web in dest.parents or dest in web.parents:
        raise RequestError(f"--web {web} and the export's folder {dest} are two folders apart")
    page.refuse_foreign(web)
    if missing := page.missing_runtime():
        raise MissingError(f"--web is refused: {missing}")
    return web


# --- photos ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """Photos by their paths, and the codes of their labels, [n]."""

    split: str
    paths: list[str]
    y: Codes


def choose(out: Out, labels: tuple[str, ...], options: ExportOptions) -> tuple[Chosen, Chosen]:
    """Choose photos to calibrate on (Training) and photos to judge by, no photo in both.

    Raises
    ------
    RequestError
        If there are none of known labels.
    """
    rows = feature_table.index(out, out.work / "none", look_only=True).rows
    known = pc.is_in(rows["label"], pa.array(labels))
    rows = rows.filter(pc.and_(known, pc.is_null(rows["error"])))
    rows = rows.select(["path", "split", "label"]).sort_by("path")
    training = rows.filter(pc.equal(rows["split"], "Training"))
    test = rows.filter(pc.equal(rows["split"], "Test"))
    # Half of a small Training at most: the other half may have to judge.
    take = min(options.calibration, max(1, training.num_rows // 2))
    picked = _evenly(training.num_rows, take)
    rest = np.setdiff1d(np.arange(training.num_rows), picked)
    judges = test if test.num_rows >= ENOUGH else training.take(pa.array(rest))
    judges = judges.take(pa.array(_evenly(judges.num_rows, options.held_out)))
    if not len(picked) or not judges.num_rows:
        raise RequestError(
            f"there are too few photos of the model's labels in {out.root}: train again on it"
        )
    split = "Test" if test.num_rows >= ENOUGH else "Training"
    calibration = training.take(pa.array(picked))
    return _chosen("Training", calibration, labels), _chosen(split, judges, labels)


def _evenly(count: int, most: int) -> Codes:
    take = min(count, most)
    return np.arange(take, dtype=np.int64) * count // max(1, take)


def _chosen(split: str, rows: pa.Table, labels: tuple[str, ...]) -> Chosen:
    place = {label: n for n, label in enumerate(labels)}
    y = np.array([place[label] for label in rows["label"].to_pylist()], np.int64)
    return Chosen(split, rows["path"].to_pylist(), y)


def _reader(out: Out) -> Reader:
    name = str(read_json(out.table_file).get("source"))
    try:
        source = open_source(name)
    except SourceError as error:
        raise RequestError(
            f"export reads photos to calibrate and judge, and their folder is gone: put the photos "
            f"back at {name}, or export without int8 and half"
        ) from error
    if source.kind == "hadoop":
        raise RequestError(
            f"export can't read photos from {name}: export without int8 and half, or extract from "
            "a copy in a local folder, s3:// or gs://"
        )
    return reader(source)


def _read(read: Reader, chosen: Chosen, size: int) -> Iterator[tuple[Pixels, Codes]]:
    """Yield pixels and codes of a few photos at a time; what can't be read now is left out."""
    for start in range(0, len(chosen.paths), READ_AT_ONCE):
        pixels, kept = [], []
        for number in range(start, min(start + READ_AT_ONCE, len(chosen.paths))):
            with contextlib.suppress(OSError):
                photo = decoding.decode(read(chosen.paths[number]), size)
                if photo.pixels is not None:
                    pixels.append(photo.pixels)
                    kept.append(number)
        found = np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)
        yield found, chosen.y[kept]


def _refuse_few(read: int, wanted: int, out: Out) -> None:
    if read < max(1, wanted / 2):
        where = read_json(out.table_file).get("source")
        raise RequestError(
            f"{wanted - read:,} of {wanted:,} photos can't be read any more: put the photos back "
            f"at {where}, or export without int8 and half"
        )


# --- files and figures -------------------------------------------------------------------------

Files = dict[str, bytes]


@dataclass(frozen=True)
class Variant:
    """A file that may be written."""

    kind: str  # half, int8
    name: str
    file: str
    content: bytes


class _Steps:
    """Count what is done as ticks."""

    def __init__(self, on_tick: OnTick, total: int) -> None:
        self.on_tick, self.total, self.done = on_tick, total, 0
        self(0)

    def __call__(self, more: int = 1) -> None:
        self.done += more
        self.on_tick(Tick("export", self.done, self.total))


def _make(
    out: Out, found: Model, options: ExportOptions, on_tick: OnTick
) -> tuple[Files, dict[str, Any]]:
    """Return the files to write, and what was judged."""
    phone = quantization.phone(found.content)
    if not options.int8 and not options.half:
        on_tick(Tick("export", 1, 1))
        return {PHONE: phone}, {}
    read = _reader(out)
    calibration, judges = choose(out, found.labels, options)
    total = len(judges.paths)
    if options.int8:
        total += len(calibration.paths) + 2 * quantization.steps()
    steps = _Steps(on_tick, total)
    size = int(found.about["preprocessing"]["image_size"])
    variants: list[Variant] = []
    judged: dict[str, Any] = {}
    if options.half:
        variants.append(Variant("half", "half", HALF, quantization.half(phone)))
    if options.int8:
        pixels = _pixels(out, read, calibration, size, steps)
        judged["calibration"] = {"split": calibration.split, "photos": len(pixels)}
        variants += _integers(phone, pixels, steps)
    threshold = float(found.about["unknown"]["threshold"])
    answers = _answers(read, judges, size, [phone, *(v.content for v in variants)], steps)
    _refuse_few(len(answers.y), len(judges.paths), out)
    judged["held_out"] = {"split": judges.split, "photos": len(answers.y)}
    judged["variants"] = _judge(variants, answers, threshold)
    kept = {row["file"] for row in judged["variants"] if row["kept"]}
    names = {row["name"] for row in judged["variants"] if row["kept"]}
    files = {v.file: v.content for v in variants if v.file in kept and v.name in names}
    return {PHONE: phone, **files}, judged


def _pixels(out: Out, read: Reader, chosen: Chosen, size: int, steps: _Steps) -> Pixels:
    parts = []
    for pixels, _ in _read(read, chosen, size):
        parts.append(pixels)
        steps(len(pixels))
    joined = np.concatenate(parts)
    _refuse_few(len(joined), len(chosen.paths), out)
    return joined


def _integers(phone: bytes, pixels: Pixels, steps: _Steps) -> list[Variant]:
    return [
        Variant(
            "int8",
            f"int8, {'per channel' if per_channel else 'per tensor'}",
            INT8,
            quantization.int8(phone, pixels, per_channel=per_channel, step=steps),
        )
        for per_channel in (True, False)
    ]


@dataclass(frozen=True)
class _Answers:
    """Of several files on the same photos: guesses [files, n], scores [files, n], codes [n]."""

    guesses: Codes
    scores: npt.NDArray[np.float32]
    y: Codes


def _answers(
    read: Reader, judges: Chosen, size: int, contents: list[bytes], steps: _Steps
) -> _Answers:
    sessions = [onnx_session(content) for content in contents]
    guesses: list[list[Codes]] = []
    scores: list[list[npt.NDArray[np.float32]]] = []
    codes: list[Codes] = []
    for pixels, y in _read(read, judges, size):
        for start in range(0, len(pixels), quantization.BATCH):
            batch = {mobilenet.INPUT: pixels[start : start + quantization.BATCH]}
            found = [loaded.run(list(ANSWER), batch) for loaded in sessions]
            guesses.append([probabilities.argmax(axis=1) for probabilities, _ in found])
            scores.append([score for _, score in found])
        codes.append(y)
        steps(len(y))
    if not guesses:
        return _Answers(np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32), codes[0])
    return _Answers(
        np.concatenate([np.stack(part) for part in guesses], axis=1),
        np.concatenate([np.stack(part) for part in scores], axis=1),
        np.concatenate(codes),
    )


def _judge(variants: list[Variant], answers: _Answers, threshold: float) -> list[dict[str, Any]]:
    """Judge all; of several that pass for one file the one that agrees most is kept."""
    rows = []
    unknown = answers.scores < threshold
    for number, variant in enumerate(variants, 1):
        figures = quantization.judge(answers.guesses[0], answers.guesses[number], answers.y)
        rows.append(
            {
                "kind": variant.kind,
                "name": variant.name,
                "file": variant.file,
                "bytes": len(variant.content),
                **figures,
                "unknown_agreement": float((unknown[0] == unknown[number]).mean()),
                "kept": False,
            }
        )
    for kind in {row["kind"] for row in rows}:
        passed = [row for row in rows if row["kind"] == kind and row["passed"]]
        if passed:
            max(passed, key=lambda row: float(row["agreement"]))["kept"] = True
    return rows


def describe(row: dict[str, Any]) -> str:
    """Return a variant's figures as words."""
    return (
        f"{row['name']}: accuracy {row['accuracy']:.2%} against {row['accuracy_float32']:.2%} "
        f"(drop {row['drop_points']:.2f} points), labels agree on {row['agreement']:.2%}"
    )


def _refusal(kind: str, about: dict[str, Any]) -> str | None:
    rows = [row for row in about.get("variants", ()) if row["kind"] == kind]
    if not rows or any(row["kept"] for row in rows):
        return None
    photos = about["held_out"]["photos"]
    return (
        f"{kind} is refused: on {photos:,} held-out photos a drop below "
        f"{quantization.MOST_DROP:g} points and agreement of at least "
        f"{quantization.LEAST_AGREEMENT:.0%} are asked for, and there is "
        + "; ".join(describe(row) for row in rows)
    )


# --- writing -----------------------------------------------------------------------------------


def _about(found: Model, files: Files, judged: dict[str, Any]) -> dict[str, Any]:
    about = found.about
    size = about["preprocessing"]["image_size"]
    return {
        "format": FORMAT,
        "pomona": versions().get("pomona"),
        "model": {"version": found.version, "digest": about["digests"]["model.onnx"]},
        "labels": list(found.labels),
        "unknown": {name: about["unknown"][name] for name in ("method", "threshold")},
        "preprocessing": about["preprocessing"],
        "input": {"name": mobilenet.INPUT, "type": "uint8", "shape": ["n", size, size, 3]},
        "outputs": list(ANSWER),
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
        **judged,
    }


def _write(out: Out, dest: Path, files: Files, about: dict[str, Any]) -> None:
    """Replace the export that is there, whole or not at all."""
    if dest.parent == out.root:
        staged = out.work / f"export-{uuid.uuid4().hex[:8]}"
        _fill(staged, files, about)
        layout.commit(out, [(staged.relative_to(out.root).as_posix(), dest.name)])
        with contextlib.suppress(OSError):  # an extract that isn't finished has its parts there
            out.work.rmdir()
        return
    with atomic_folder(dest, "--dest") as staged:
        _fill(staged, files, about)


def _fill(folder: Path, files: Files, about: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    write_json(folder / ABOUT, about)
