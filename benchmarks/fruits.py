"""Make what the package holds: weights from a random start, a model on them, their card.

    python benchmarks/fruits.py SOURCE --teacher WEIGHTS --not-fruit FOLDER --work WORK

Two runs of `pomona finetune`: small photos from ``random:0``, then larger ones from what that gave.
The teacher's features are an aim; none of its values is in the result, which starts from random
numbers. Then `pomona run` on the weights, whose model is judged, packed and described. SOURCE is
Fruits-360 (the 3-body edition); its Test varieties are not trained on. Killed, it goes on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

import backbones
import common
from pomona.backbone import mobilenet, weights
from pomona.core.files import atomic_file, sha256, write_json
from pomona.export import quantization
from pomona.model import artifact

SIZES = (96, 128)
HEAD = ("--components", "200", "--keep", "0.99")
"""Share of Training, which the weights have seen: of Test less is kept (docs/log.md)."""
CARD = Path(__file__).with_name("fruits.md")


def main() -> int:
    found = common.parser(__doc__)
    found.add_argument("source", type=Path, metavar="SOURCE", help="a local folder of photos")
    found.add_argument("--teacher", default=weights.default(), help="default: POMONA_WEIGHTS")
    found.add_argument("--teacher-is", default="", help="what it is, and its licence, for the card")
    found.add_argument("--not-fruit", type=Path, required=True, help="photos of something else")
    found.add_argument("--work", type=Path, required=True, help="takes the runs; kept")
    found.add_argument("--minutes", type=float, nargs=2, default=(34.0, 16.0))
    found.add_argument("--seed", type=int, default=0)
    found.add_argument(
        "--to", type=Path, default=weights.FRUITS.parent, help="default: into the package"
    )
    options = found.parse_args()
    start, runs = f"random:{options.seed}", []
    for number, (size, minutes) in enumerate(zip(SIZES, options.minutes, strict=True)):
        out = options.work / str(number + 1)
        common.say(f"run {number + 1}: {size} pixels from {start}, {minutes:g} minutes")
        runs.append(_finetune(options, out, start, size, minutes))
        start = str(out / "weights.safetensors")
    place = options.to / weights.FRUITS.name
    about = write(Path(start), place, runs)
    name = "fruits" if place == weights.FRUITS else str(place)
    out = options.work / "run"
    about["figures"] = backbones.judge(
        options.source, out, name, SIZES[-1], options.not_fruit, *HEAD
    )
    about["teacher"] = options.teacher_is or Path(options.teacher).name
    about["machine"] = common.machine()
    about["model"] = pack(out / "model", options.to / artifact.PACKAGED.name)
    write_json(place.with_suffix(".json"), about)
    (options.to / "README.md").write_text(card(about))
    print(json.dumps(about, indent=2, sort_keys=True))
    common.write_figures(options.json, about)
    return 0


def _finetune(options: Any, out: Path, start: str, size: int, minutes: float) -> dict[str, Any]:
    words = ["finetune", options.source, "--out", out, "--from", start, "--no-mlflow"]
    words += ["--label", "top", "--hold-out", "0", "--precision", "mixed"]
    words += ["--image-size", size, "--minutes", minutes, "--teacher", options.teacher]
    words += ["--seed", options.seed]
    return common.run_pomona(*map(str, words)).answer


def write(result: Path, to: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the weights as float16. Returns what made them."""
    found = weights.load_weights(str(result))
    assert found.state is not None
    half = {key: value.astype(np.float16) for key, value in narrow(found.state).items()}
    to.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(to) as part:
        part.write_bytes(weights.to_bytes(half, found.tuned_on))
    about: dict[str, Any] = {
        "digest": weights.fruits(to).digest,
        "bytes": to.stat().st_size,
        "sha256": sha256(to),
        "runs": [
            {k: run[k] for k in ("recipe", "made_from", "test", "labels", "groups", "times")}
            | {"steps": run["held_out"]["step"], "training_loss": run["held_out"]["training_loss"]}
            for run in runs
        ],
    }
    for run in about["runs"]:
        run["made_from"] = {**run["made_from"], "source": Path(run["made_from"]["source"]).name}
    return about


def narrow(state: dict[str, Any]) -> dict[str, Any]:
    """Fold batch norms first: their variances may lie outside of what float16 holds well."""
    return mobilenet.unfolded(mobilenet.folded(state))


def pack(made: Path, to: Path) -> dict[str, Any]:
    """Copy a model's folder with the backbone in float16: of weights that are, nothing is lost."""
    found = artifact.load_model(made)
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    shutil.copyfile(made / "classifier.safetensors", to / "classifier.safetensors")
    (to / "model.onnx").write_bytes(quantization.half(found.content, head=False))
    artifact.write_about(
        to, {k: v for k, v in found.about.items() if k not in ("digest", "digests")}
    )
    packed = artifact.load_model(to)
    return {"version": packed.version, "bytes": sum(p.stat().st_size for p in to.iterdir())}


def card(about: dict[str, Any]) -> str:
    """Return the model card: the text beside this file with the figures in it."""
    figures = about["figures"]
    low, high = figures["unseen_interval"]
    facts = {
        "seconds": sum(run["times"]["seconds"] for run in about["runs"]),
        "photos_seen": sum(run["steps"] * run["recipe"]["batch_size"] for run in about["runs"]),
        "minutes": " ".join(
            f"{run['made_from']['settings']['minutes']:g}" for run in about["runs"]
        ),
        "seed": about["runs"][0]["made_from"]["settings"]["seed"],
        "head": " ".join(HEAD),
        "apart": about["runs"][0]["recipe"]["apart"],
        "sizes": ", then ".join(str(run["recipe"]["image_size"]) for run in about["runs"]),
        "teacher": about["teacher"],
        "machine": f"{about['machine']['cores']} shared cores ({about['machine']['cpu']})",
        "model_mb": about["model"]["bytes"] / 1e6,
        "mb": about["bytes"] / 1e6,
        "low": low,
        "high": high,
        "digest": about["digest"],
        **figures,
    }
    return CARD.read_text().format(**facts)


if __name__ == "__main__":
    common.start(main)
