"""A LiteRT (TFLite) file of the model, and its answers beside phone.onnx's, on the same photos.

    python benchmarks/litert.py phone.tflite SOURCE --export OUT/export --convert

``--convert`` makes the file, with litert-torch (docs/mobile.md: in an environment of its own);
without it the file is there, whoever made it, and ai-edge-litert is enough. Both files run on one
thread, in turn. The exit code is 2 if they aren't the same model.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import common
from pomona.backbone import mobilenet
from pomona.backbone.session import onnx_session
from pomona.core.errors import MissingError, RequestError
from pomona.export.export import ABOUT, PHONE
from pomona.model.head import ANSWER
from pomona.photos import decoding

MOST_APART = 1e-3
"""Between probabilities. Float32 on both sides gives about 1e-5."""

Answer = tuple[npt.NDArray[np.float32], float]
Runner = Callable[[npt.NDArray[np.uint8]], Answer]


def convert(file: Path, to: Path, size: int) -> None:
    try:
        import litert_torch
        import torch
    except ImportError as error:
        raise MissingError("there is no converter: pip install litert-torch") from error
    from replay import Replay

    photo = torch.zeros((1, size, size, 3), dtype=torch.uint8)
    found = litert_torch.convert(Replay(file).eval(), sample_kwargs={mobilenet.INPUT: photo})
    found.export(str(to))


def onnx(file: Path) -> Runner:
    session = onnx_session(file.read_bytes(), threads=1)

    def run(image: npt.NDArray[np.uint8]) -> Answer:
        probabilities, score = session.run(list(ANSWER), {mobilenet.INPUT: image})
        return probabilities[0], float(score[0])

    return run


def litert(file: Path, shape: list[int]) -> Runner:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise MissingError("LiteRT isn't here: pip install ai-edge-litert") from error
    interpreter = Interpreter(model_path=str(file), num_threads=1)
    interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()
    if given["dtype"] != np.uint8 or given["shape"].tolist() != shape:
        raise RequestError(
            f"{file} takes {given['dtype'].__name__} {given['shape'].tolist()}, not uint8 {shape}: "
            "convert it with the input's layout kept"
        )
    # By their ranks, as converters rename outputs: probabilities [1, labels], score [1].
    probabilities, score = sorted(
        interpreter.get_output_details(), key=lambda output: -len(output["shape"])
    )

    def run(image: npt.NDArray[np.uint8]) -> Answer:
        interpreter.set_tensor(given["index"], image)
        interpreter.invoke()
        found = (interpreter.get_tensor(output["index"])[0] for output in (probabilities, score))
        return next(found), float(next(found))

    return run


def decoded(paths: list[Path], size: int) -> list[npt.NDArray[np.uint8]]:
    photos = [decoding.decode(path.read_bytes(), size).pixels for path in paths]
    return [pixels[None] for pixels in photos if pixels is not None]


def compare(
    ours: Runner, theirs: Runner, photos: list[npt.NDArray[np.uint8]], threshold: float
) -> dict[str, float]:
    apart, scores, labels, unknown = [], [], [], []
    seconds: tuple[list[float], list[float]] = ([], [])
    for image in photos:
        found = []
        for run, taken in zip((ours, theirs), seconds, strict=True):
            start = time.perf_counter()
            found.append(run(image))
            taken.append(time.perf_counter() - start)
        (p, s), (q, t) = found
        apart.append(float(np.abs(p - q).max()))
        scores.append(abs(s - t) / max(abs(s), 1e-9))
        labels.append(p.argmax() == q.argmax())
        unknown.append((s < threshold) == (t < threshold))
    return {
        "photos": len(photos),
        "largest_difference": max(apart),
        "score_difference": max(scores),
        "labels_same": float(np.mean(labels)),
        "unknown_same": float(np.mean(unknown)),
        "onnx_ms": 1000 * statistics.median(seconds[0]),
        "litert_ms": 1000 * statistics.median(seconds[1]),
    }


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="a .tflite file")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a local folder of photos")
    parser.add_argument("--export", type=Path, required=True, help="OUT/export")
    parser.add_argument("--convert", action="store_true", help="make FILE first")
    parser.add_argument("--photos", type=common.positive, default=1000, help="(default: 1000)")
    options = parser.parse_args()
    about: dict[str, Any] = json.loads((options.export / ABOUT).read_text())
    size = int(about["preprocessing"]["image_size"])
    paths = common.spread(options.source, options.photos)
    if options.convert:
        convert(options.export / PHONE, options.file, size)
    ours = onnx(options.export / PHONE)
    theirs = litert(options.file, [1, size, size, 3])
    figures = compare(ours, theirs, decoded(paths, size), about["unknown"]["threshold"])
    figures["bytes"] = options.file.stat().st_size
    common.say(common.table(["figure", "value"], list(figures.items())))
    common.write_figures(options.json, {"litert": figures})
    if figures["largest_difference"] > MOST_APART or figures["unknown_same"] < 1:
        raise RequestError(f"{options.file} isn't the same model: don't ship it")
    return 0


if __name__ == "__main__":
    common.start(main)
