"""What a backbone is worth: the same pipeline on several weights, all on the same photos.

    python benchmarks/backbones.py SOURCE --not-fruit FOLDER imagenet:224 fruits:128

Each argument is weights and the side of the photos. ``unseen``: Test, whose varieties neither the
backbone nor the classifier saw. ``seen``: a random quarter of Training, each variety a label of
its own; where the weights were tuned on Training, the backbone saw those photos. ``AUROC``: Test
against photos of something else, each whole and in quarters; ``refused``: those of them that are
called unknown; ``kept``: Test photos that aren't.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import accuracy
import common
import export
from pomona.backbone import extract
from pomona.backbone.session import onnx_session
from pomona.core.files import read_json
from pomona.export.phone import half_precision, phone_file
from pomona.model import artifact, classifier, metrics
from pomona.workspace import layout

Pixels = Any


def main() -> int:
    found = common.parser(__doc__)
    found.add_argument("source", type=Path, metavar="SOURCE", help="a local folder of photos")
    found.add_argument("weights", nargs="+", metavar="WEIGHTS:SIDE")
    found.add_argument("--not-fruit", type=Path, required=True, help="photos of something else")
    found.add_argument("--work", type=Path, help="takes the runs, and is kept")
    options = found.parse_args()
    with common.scratch() as scratch:
        rows = []
        for number, asked in enumerate(options.weights):
            name, _, side = asked.rpartition(":")
            common.say(f"{name} at {side} pixels")
            out = (options.work or scratch) / f"{number}-{Path(name).stem}-{side}"
            rows.append(judge(options.source, out, name, int(side), options.not_fruit))
    print(table(rows))
    common.write_figures(options.json, {"backbones": rows})
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as a table, shares in percent."""
    shares = ("unseen", "seen", "near_copies", "kept")
    head = ("weights", "side", *shares, "AUROC", "refused", "MB", "MB half", "ms", "photos/s")
    return common.table(
        head,
        [
            (
                row["weights"],
                row["side"],
                *(100 * row[name] for name in shares),
                row["auroc"],
                f"{row['refused']} of {row['strangers']}",
                row["phone_mb"],
                row["half_mb"],
                row["photo_ms"],
                row["photos_per_second"],
            )
            for row in rows
        ],
    )


def judge(
    source: Path, out: Path, weights: str, side: int, not_fruit: Path, *further: str
) -> dict[str, Any]:
    """Run the pipeline into ``out``, and return what the weights are worth."""
    words = ["run", source, "--out", out, "--label", "top", "--weights", weights]
    words += ["--image-size", side, "--no-mlflow", "--no-plots", *further]
    ran = common.run_pomona(*map(str, words)).answer
    figures = read_json(layout.Out(out).metrics)
    made = artifact.load_model(out / "model")
    with classifier.one_thread_each():
        seen = accuracy.seen_varieties(accuracy.read(out, "Training"))[accuracy.DEFAULT][0]
    known = made.head().apply(accuracy.read(out, "Test").x)["score"]
    pixels = photos_of(not_fruit, side)
    strange = scores(made, pixels)
    limit = float(made.about["unknown"]["threshold"])
    phone = phone_file(made.content)
    test = figures["test"]
    return {
        "weights": Path(weights).name,
        "side": side,
        "unseen": test["accuracy"]["value"],
        "unseen_interval": [test["accuracy"]["low"], test["accuracy"]["high"]],
        "unseen_groups": test["units"],
        "unseen_photos": test["photos"],
        "cross_validation": figures["cross_validation"]["accuracy"]["value"],
        "seen": seen,
        "near_copies": figures["leakage"]["near_copies"] / figures["leakage"]["looked_at"],
        "calibration_error": test["calibration_error"]["value"],
        "kept": test["kept"],
        "method": made.about["unknown"]["method"],
        "auroc": metrics.auroc(known, strange),
        "refused": int((strange < limit).sum()),
        "strangers": len(strange),
        "phone_mb": common.megabytes(len(phone)),
        "half_mb": common.megabytes(len(half_precision(phone))),
        "photo_ms": round(export.milliseconds(onnx_session(phone, 1), pixels[:1]), 2),
        "photos_per_second": ran["extract"]["times"]["photos_per_second"],
    }


def photos_of(folder: Path, side: int) -> Pixels:
    """Return a folder's photos, each whole and its four quarters: uint8 [5 n, side, side, 3]."""
    found = []
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            whole = image.convert("RGB")
        w, h = whole.width // 2, whole.height // 2
        boxes = [(x, y, x + w, y + h) for x in (0, w) for y in (0, h)]
        for part in (whole, *(whole.crop(box) for box in boxes)):
            found.append(np.asarray(part.resize((side, side), Image.Resampling.BILINEAR)))
    return np.stack(found)


def scores(made: artifact.Model, pixels: Pixels) -> Any:
    run = extract.load_network(made.spec())
    place = made.spec().outputs.index("score")
    return np.concatenate([run(pixels[n : n + 1])[place] for n in range(len(pixels))])


if __name__ == "__main__":
    common.start(main)
