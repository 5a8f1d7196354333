"""Make the weights that lie in the package, from a random start, and their model card.

    python benchmarks/fruits.py SOURCE --teacher WEIGHTS --work FOLDER --minutes 40 20

Two runs of `pomona finetune`: small photos from ``random:0``, then larger ones from what that gave.
The teacher's features are an aim; none of its values is in the result, which starts from random
numbers. SOURCE is Fruits-360 (the 3-body edition); its Test varieties are not trained on. Killed,
it goes on. What made the weights is written beside them, as JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

import common
from pomona import manifest, mobilenet, weights

SIZES = (96, 128)


def main() -> int:
    found = common.parser(__doc__)
    found.add_argument("source", type=Path, metavar="SOURCE", help="a local folder of photos")
    found.add_argument("--teacher", default=weights.default(), help="default: POMONA_WEIGHTS")
    found.add_argument("--work", type=Path, required=True, help="takes the runs; kept")
    found.add_argument("--minutes", type=float, nargs=2, default=(60.0, 30.0))
    found.add_argument("--seed", type=int, default=0)
    found.add_argument(
        "--to", type=Path, default=weights.FRUITS, help="the file to write (default: the package's)"
    )
    options = found.parse_args()
    start, runs = f"random:{options.seed}", []
    for number, (size, minutes) in enumerate(zip(SIZES, options.minutes, strict=True)):
        out = options.work / str(number + 1)
        common.say(f"run {number + 1}: {size} pixels from {start}, {minutes:g} minutes")
        runs.append(_finetune(options, out, start, size, minutes))
        start = str(out / "weights.safetensors")
    about = write(Path(start), options.to, runs)
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
    """Write the weights as float16, and what made them as JSON beside them."""
    state = mobilenet.check(load_file(result), str(result))
    half = {key: value.astype(np.float16) for key, value in narrow(state).items()}
    to.parent.mkdir(parents=True, exist_ok=True)
    with manifest.aside(to) as part:
        part.write_bytes(save(half, {"pomona": "finetune from a random start"}))
    about: dict[str, Any] = {
        "digest": weights.fruits(to).digest,
        "bytes": to.stat().st_size,
        "sha256": manifest.sha256(to),
        "runs": [
            {k: run[k] for k in ("recipe", "made_from", "held_out", "test", "labels", "times")}
            for run in runs
        ],
    }
    for run in about["runs"]:
        run["made_from"] = {**run["made_from"], "source": Path(run["made_from"]["source"]).name}
    manifest.write_json(to.with_suffix(".json"), about)
    return about


def narrow(state: dict[str, Any]) -> dict[str, Any]:
    """Fold batch norms first: their variances may lie outside of what float16 holds well."""
    return mobilenet.unfolded(mobilenet.folded(state))


if __name__ == "__main__":
    common.start(main)
