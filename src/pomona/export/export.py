"""The stage ``export``: from ``OUT/model`` to the phone's files, each judged on held-out photos.

``phone.onnx`` is the model without the outputs that only Pomona needs. ``phone-half.onnx`` and
``phone-int8.onnx`` are smaller, and are written only if they pass `pomona.export.judgement.judge`.
``export.json`` says what a program needs to use them, so that the folder is complete by itself.
With `web` the page that recognises fruit is written too, with the smallest of these files.
"""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pomona.backbone.mobilenet import INPUT
from pomona.core.errors import MissingError, RequestError
from pomona.core.files import atomic_folder, write_json
from pomona.core.progress import OnTick, Steps, Tick, quiet
from pomona.core.provenance import versions
from pomona.core.uris import local_path
from pomona.export import quantization
from pomona.export.judgement import Variant, choose, judge_all, read_photos, refusal, run_files
from pomona.export.phone import half_precision, page_files, phone_file
from pomona.model.artifact import Model, load_model
from pomona.model.head import ANSWER
from pomona.photos.decoding import Pixels
from pomona.web import page
from pomona.workspace import layout
from pomona.workspace.layout import Out

FORMAT = 1
"""Of the folder. Raise it when a reader of the old one would be wrong."""

PHONE, HALF, INT8 = "phone.onnx", "phone-half.onnx", "phone-int8.onnx"
ABOUT = "export.json"

Files = dict[str, bytes]


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

    Runs on the driver, without Spark. A variant that was asked for and didn't pass is not written;
    the rest is, and ``export.json`` has the figures of all.

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
        model = load_model(folder.model)
        files, judged = _make(folder, model, options, on_tick)
        about = _about(model, files, judged)
        _write(folder, dest, files, about)
        if web:
            smallest = min(files, key=lambda name: len(files[name]))
            page.write(web, page_files(model, files[smallest], service=False))
            about |= {"web": {"folder": str(web), "file": smallest}}
    refused = [line for line in (refusal(kind, about) for kind in ("half", "int8")) if line]
    if refused:
        raise RequestError("; ".join([*refused, f"the rest is in {dest}"]))
    return {**about, "folder": str(dest)}


def _refuse_foreign(dest: Path) -> None:
    if dest.exists() and not dest.is_dir():
        raise RequestError(f"{dest} is a file: --dest is a folder")
    if dest.is_dir() and any(dest.iterdir()) and not (dest / ABOUT).exists():
        raise RequestError(f"{dest} holds other files than an export's: choose a new folder")


def _page_folder(options: ExportOptions, dest: Path) -> Path | None:
    """Return where the page goes. Whatever it lacks is refused before any work is done."""
    if options.web is None:
        return None
    web = local_path(options.web)
    if web == dest or web in dest.parents or dest in web.parents:
        raise RequestError(f"--web {web} and the export's folder {dest} are two folders apart")
    page.refuse_foreign(web)
    if missing := page.missing_runtime():
        raise MissingError(f"--web is refused: {missing}")
    return web


def _make(
    out: Out, model: Model, options: ExportOptions, on_tick: OnTick
) -> tuple[Files, dict[str, Any]]:
    """Return the files to write, and what ``export.json`` says of their judgement."""
    phone = phone_file(model.content)
    if not options.int8 and not options.half:
        on_tick(Tick("export", 1, 1))
        return {PHONE: phone}, {}
    calibration, judges = choose(out, model.labels, options.calibration, options.held_out)
    total = len(judges.paths)
    if options.int8:
        total += len(calibration.paths) + 2 * quantization.steps()
    steps = Steps(on_tick, "export", total)
    size = int(model.about["preprocessing"]["image_size"])
    variants: list[Variant] = []
    judged: dict[str, Any] = {}
    if options.half:
        variants.append(Variant("half", "half", HALF, half_precision(phone)))
    if options.int8:
        pixels = np.concatenate([part for part, _ in read_photos(out, calibration, size, steps)])
        judged["calibration"] = {"split": calibration.split, "photos": len(pixels)}
        variants += _integers(phone, pixels, steps)
    photos = read_photos(out, judges, size, steps)
    answers = run_files(photos, [phone, *(variant.content for variant in variants)])
    judged["held_out"] = {"split": judges.split, "photos": len(answers.y)}
    rows = judge_all(variants, answers, float(model.about["unknown"]["threshold"]))
    kept = {v.file: v.content for v, row in zip(variants, rows, strict=True) if row["kept"]}
    return {PHONE: phone, **kept}, {**judged, "variants": rows}


def _integers(phone: bytes, pixels: Pixels, steps: Steps) -> list[Variant]:
    return [
        Variant(
            "int8",
            f"int8, {'per channel' if per_channel else 'per tensor'}",
            INT8,
            quantization.int8(phone, pixels, per_channel=per_channel, step=steps),
        )
        for per_channel in (True, False)
    ]


def _about(model: Model, files: Files, judged: dict[str, Any]) -> dict[str, Any]:
    about = model.about
    size = about["preprocessing"]["image_size"]
    return {
        "format": FORMAT,
        "pomona": versions().get("pomona"),
        "model": {"version": model.version, "digest": about["digests"]["model.onnx"]},
        "labels": list(model.labels),
        "unknown": {name: about["unknown"][name] for name in ("method", "threshold")},
        "preprocessing": about["preprocessing"],
        "input": {"name": INPUT, "type": "uint8", "shape": ["n", size, size, 3]},
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
        with contextlib.suppress(OSError):  # not empty: an unfinished extract's parts
            out.work.rmdir()
        return
    with atomic_folder(dest, "--dest") as staged:
        _fill(staged, files, about)


def _fill(folder: Path, files: Files, about: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    write_json(folder / ABOUT, about)
