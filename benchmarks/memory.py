"""Does a worker's memory grow with the number of photos? ``pomona extract`` at two sizes.

Spark runs as local[2] in a child; the Python workers that it forks are sampled every 50 ms. RSS is
the kernel's own peak where it keeps one; USS is what a worker has to itself, PSS its fair share.
The exit status is 1 if a bound isn't kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common

WANTED_RATIO = 1.10
WANTED_MB = 600
KINDS = ("rss", "uss", "pss")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Extract the sizes one after another and return the figures."""
    peaks: dict[int, common.Peaks] = {}
    for count in options.sizes:
        photos = folder / f"photos{count}"
        common.link_photos(options.source, photos, count)
        common.say(f"{count:,} photos")
        words = ("--weights", options.weights, "--master", "local[2]", "--max-error-rate", "1")
        ran = common.run_pomona("extract", photos, "--out", folder / f"out{count}", *words)
        peaks[count] = ran.peaks
    workers = [peaks[count].of("worker") for count in options.sizes]
    return {
        "peaks": peaks,
        "ratios": {
            kind: getattr(workers[-1], kind) / max(1, getattr(workers[0], kind)) for kind in KINDS
        },
        "most_rss_mb": common.megabytes(max(worker.rss for worker in workers)),
    }


def show(figures: dict[str, Any]) -> bool:
    """Print the tables; return whether the bounds are kept."""
    rows = []
    for count, peaks in figures["peaks"].items():
        mine = [peak for peak in peaks.processes if peak.role == "worker"]
        worker = peaks.of("worker")
        sizes = (worker.rss, worker.uss, worker.pss, peaks.of("driver").rss, peaks.of("jvm").rss)
        rows.append((f"{count:,}", len(mine), *map(common.megabytes, sizes)))
    ratios = figures["ratios"]
    rows.append(("last / first", "", *(round(ratios[kind], 3) for kind in KINDS), "", ""))
    head = ("photos", "workers", *(f"{kind.upper()} MB" for kind in KINDS), "driver", "JVM RSS")
    print("peaks; of the workers the largest\n")
    print(common.table(head, rows))
    steady, small = ratios["rss"] <= WANTED_RATIO, figures["most_rss_mb"] < WANTED_MB
    print(f"\nRSS last / first <= {WANTED_RATIO:.2f}: {'yes' if steady else 'NO'}")
    print(f"every worker's RSS < {WANTED_MB} MB: {'yes' if small else 'NO'}")
    return bool(steady and small)


def sizes(text: str) -> list[int]:
    """Read ``2000,16000``."""
    return [common.positive(word) for word in text.split(",")]


def main() -> int:
    parser = common.parser(__doc__)
    common.add_source(parser)
    parser.add_argument(
        "--sizes",
        type=sizes,
        default=[2000, 16000],
        metavar="A,B",
        help="photos to extract; a source with fewer is repeated under other names "
        "(default: 2000,16000)",
    )
    options = parser.parse_args()
    with common.scratch() as folder:
        figures = measure(options, folder)
    kept = show(figures)
    common.write_figures(options.json, figures)
    return 0 if kept else 1


if __name__ == "__main__":
    common.start(main)
