"""Scale-out: a Spark standalone cluster on this machine, with one worker and with two.

Each worker is a process of its own with one core; executors have a Python without Pomona, and get
it from the driver. "bare" is the same network in as many plain processes on pixels in memory. With
root also a cluster whose executors don't see OUT, so that parts come back through Spark.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import common
import extract
from pomona.backbone.spec import make_spec
from pomona.backbone.weights import load_weights

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.cluster import MEMORY, Cluster, cluster, hiding, python_without_pomona

ONE, TWO, APART = "one worker", "two workers", "two workers, OUT unseen"
BARE_ONE, BARE_TWO = "bare ONNX Runtime, one process", "bare ONNX Runtime, two"


def rate(source: Path, out: Path, where: Cluster, weights: str) -> float:
    """Return photos per second in extract, without Spark's start."""
    words: list[str | Path] = ["extract", source, "--out", out, "--weights", weights]
    words += ["--master", where.url, "--device", "cpu", "--max-error-rate", "1"]
    for key, value in MEMORY.items():
        words += ["--spark-conf", f"{key}={value}"]
    words += ["--spark-conf", f"spark.driver.host={where.host}"]
    os.environ["PYSPARK_PYTHON"] = str(where.python)
    ran = common.run_pomona(*words)
    return float(ran.answer["extract"]["times"]["photos_per_second"])


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all contenders, in rounds."""
    photos = folder / "photos"
    common.link_photos(options.source, photos, options.photos)
    common.read_once(photos)
    spec = make_spec(load_weights(options.weights), device="cpu")
    python = python_without_pomona(folder / "python")
    rounds = []
    for number in range(options.rounds):
        common.say(f"round {number + 1} of {options.rounds}")
        here = folder / str(number)
        rates = {}
        with cluster(here / "c", python) as found:
            found.start_worker("first")
            rates[ONE] = rate(photos, here / "one", found, options.weights)
            found.start_worker("second")
            rates[TWO] = rate(photos, here / "two", found, options.weights)
        if os.geteuid() == 0:
            unseen = here / "unseen"
            unseen.mkdir()
            with cluster(here / "a", python) as found:
                for name in ("first", "second"):
                    found.start_worker(name, before=hiding(unseen))
                rates[APART] = rate(photos, unseen / "out", found, options.weights)
        network = extract.run_network
        rates[BARE_ONE] = extract.rate_in_processes(network, photos, spec, 1)
        rates[BARE_TWO] = extract.rate_in_processes(network, photos, spec, 2)
        rounds.append(rates)
    return {"photos": options.photos, "rounds": rounds, "rates": common.medians(rounds)}


def main() -> int:
    parser = common.parser(__doc__)
    common.add_source(parser)
    parser.add_argument("--photos", type=common.positive, default=6000, help="(default: 6000)")
    common.add_rounds(parser, 1)
    options = parser.parse_args()
    with common.scratch() as folder:
        figures = measure(options, folder)
    rates = figures["rates"]
    print(common.table(("contender", "photos/s"), rates.items()))
    shares = [
        ("two workers beside one", rates[TWO] / rates[ONE]),
        ("not the network, one worker", 1 - rates[ONE] / rates[BARE_ONE]),
        ("not the network, two workers", 1 - rates[TWO] / rates[BARE_TWO]),
    ]
    if APART in rates:
        shares.append(("OUT unseen beside seen", rates[APART] / rates[TWO]))
    print(common.table(("ratio", ""), shares))
    common.write_figures(options.json, figures)
    return 0


if __name__ == "__main__":
    common.start(main)
