"""How much fine-tuning brings on varieties never seen: each fold of Training held out in turn.

    python benchmarks/finetune.py SOURCE --weights W --image-size 128 --minutes 10

Test is not looked at: `pomona finetune` does that once, with the recipe that was chosen here.
"before" is logistic regression on the features of the weights as they came; "last" is the look at
the run's end; "best" was chosen on the same photos, and flatters.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import common
from pomona.pipeline import finetune
from pomona.pipeline.finetune import FinetuneOptions


def main() -> int:
    found = common.parser(__doc__)
    common.add_source(found)
    found.add_argument("--label", default="top", help="top or parent (default: top)")
    found.add_argument("--image-size", type=common.positive, default=128)
    found.add_argument("--minutes", type=float, help="for each fold")
    found.add_argument("--epochs", type=float, help="for each fold")
    found.add_argument("--folds", type=common.positive, default=5, help="of five, how many to run")
    options = found.parse_args()
    runs = []
    with common.scratch() as folder:
        for fold in range(min(5, options.folds)):
            common.say(f"fold {fold + 1} of {options.folds}")
            runs.append(_fold(options, folder / str(fold), fold))
    rows = [
        (
            run["fold"] + 1,
            run["photos"],
            100 * run.get("before", {}).get("accuracy", 0.0),
            100 * run["last"],
            100 * run["accuracy"],
            run["step"],
        )
        for run in runs
    ]
    print(
        common.table(("fold", "photos held out", "before, %", "last, %", "best, %", "step"), rows)
    )
    total = sum(run["photos"] for run in runs)
    mean = sum(run["last"] * run["photos"] for run in runs) / total
    print(f"last look, mean over photos: {mean:.2%}")
    common.write_figures(options.json, {"folds": runs})
    return 0


def _fold(options: Any, out: Path, fold: int) -> dict[str, Any]:
    asked = FinetuneOptions(
        start=options.weights,
        label=options.label,
        image_size=options.image_size,
        minutes=options.minutes,
        epochs=options.epochs,
        judge_test=False,
        fold=fold,
    )
    record = finetune.finetune(options.source, out, asked)
    shutil.rmtree(out)
    history = record["history"]
    return {"fold": fold, **record["held_out"], "last": history[-1]["accuracy"], "history": history}


if __name__ == "__main__":
    common.start(main)
