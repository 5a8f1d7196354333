"""What it costs that a power cut loses nothing: ``pomona run`` with fsync, and with one that does
nothing, in turn.

Small photos and few pixels make the rest of the work small, so that the share of fsync is the
largest that it can be. Calls are counted in the driver; workers are ended at once and tell none.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import common

WITH, WITHOUT = "with fsync", "without"

COUNTING = """
import atexit, os
real, count = os.fsync, 0

def fsync(file):
    global count
    count += 1
    if {real}:
        real(file)

os.fsync = fsync
atexit.register(lambda: os.write(os.open({log!r}, os.O_WRONLY | os.O_APPEND), b"%d\\n" % count))
"""


def run(
    options: argparse.Namespace, folder: Path, photos: Path, *, real: bool
) -> tuple[float, int]:
    """Return the seconds of a run, and how often it called fsync."""
    hook = folder / f"hook-{real}"
    hook.mkdir(exist_ok=True)
    log = hook / "counts"
    log.write_text("")
    (hook / "sitecustomize.py").write_text(COUNTING.format(real=real, log=str(log)))
    out = folder / f"out-{len(list(folder.iterdir()))}"
    words = ("--weights", "fruits", "--image-size", str(options.image_size), "--device", "cpu")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(hook), before]))
    try:
        ran = common.run_pomona(
            "run", photos, "--out", out, *words, "--no-plots", "--no-mlflow", "--no-train"
        )
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return ran.seconds, sum(int(line) for line in log.read_text().split())


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    photos = folder / "photos"
    common.link_photos(options.source, photos, options.photos)
    common.read_once(photos)
    rounds, counts = [], 0
    for number in range(options.rounds):
        common.say(f"round {number + 1} of {options.rounds}")
        seconds, counts = run(options, folder, photos, real=True)
        rounds.append({WITH: seconds, WITHOUT: run(options, folder, photos, real=False)[0]})
    seconds_of = common.medians(rounds)
    return {
        "photos": options.photos,
        "seconds": seconds_of,
        "rounds": rounds,
        "ratio": seconds_of[WITH] / seconds_of[WITHOUT],
        "fsyncs_of_driver": counts,
    }


def main() -> int:
    parser = common.parser(__doc__)
    common.add_source(parser)
    parser.add_argument("--photos", type=common.positive, default=16_000, metavar="N")
    parser.add_argument("--image-size", type=common.positive, default=32, metavar="PIXELS")
    common.add_rounds(parser, 3)
    options = parser.parse_args()
    with common.scratch() as folder:
        figures = measure(options, folder)
    print(common.table(("run", "seconds"), figures["seconds"].items()))
    print(f"\nratio {figures['ratio']:.3f}, {figures['fsyncs_of_driver']} calls of the driver")
    common.write_figures(options.json, figures)
    return 0


if __name__ == "__main__":
    common.start(main)
