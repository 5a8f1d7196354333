"""Size, load time and speed of the phone's files: float32, half precision, 8-bit integers.

    python benchmarks/export.py --out OUT

Makes the files with ``pomona export --half --int8`` (a file that the gate refuses is left out) and
runs each on one thread, in turn, in rounds, on the same pixels; medians are shown.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

import common
from pomona.backbone.session import onnx_session
from pomona.core.errors import RequestError
from pomona.export.export import HALF, INT8, PHONE, ExportOptions, export

CALLS = 40


def milliseconds(session: Any, image: Any) -> float:
    """One photo's share of a call, the median of `CALLS`."""
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        session.run(["probabilities", "score"], {"image": image})
        times.append((time.perf_counter() - start) / len(image))
    return 1000 * statistics.median(times)


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a folder with a trained model")
    common.add_rounds(parser, 5)
    options = parser.parse_args()
    try:
        about = export(options.out, ExportOptions(int8=True, half=True))
        folder = Path(about["folder"])
    except RequestError as error:  # a refusal; what passed is there
        common.say(str(error))
        folder = options.out / "export"
    files = [name for name in (PHONE, HALF, INT8) if (folder / name).exists()]
    contents = {name: (folder / name).read_bytes() for name in files}
    loads: dict[str, list[float]] = {name: [] for name in files}
    sessions = {}
    for _ in range(options.rounds):
        for name in files:
            start = time.perf_counter()
            sessions[name] = onnx_session(contents[name], threads=1)
            loads[name].append(1000 * (time.perf_counter() - start))
    size = sessions[PHONE].get_inputs()[0].shape[1]
    image = np.random.default_rng(0).integers(0, 256, (8, size, size, 3), dtype=np.uint8)
    rounds: list[dict[str, float]] = [
        {
            f"{name} {count}": milliseconds(sessions[name], image[:count])
            for count in (1, 8)
            for name in files
        }
        for _ in range(options.rounds)
    ]
    found = common.medians(rounds)
    rows = []
    figures: dict[str, Any] = {}
    for name in files:
        figures[name] = {
            "bytes": len(contents[name]),
            "load_ms": statistics.median(loads[name]),
            "ms_alone": found[f"{name} 1"],
            "ms_of_eight": found[f"{name} 8"],
            "speed_alone": found[f"{PHONE} 1"] / found[f"{name} 1"],
            "speed_of_eight": found[f"{PHONE} 8"] / found[f"{name} 8"],
        }
        row = figures[name]
        rows.append(
            [
                name,
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['load_ms']:.0f}",
                f"{row['ms_alone']:.1f}",
                f"{row['speed_alone']:.2f}",
                f"{row['ms_of_eight']:.1f}",
                f"{row['speed_of_eight']:.2f}",
            ]
        )
    head = ["file", "MB", "load ms", "ms alone", "× float32", "ms of eight", "× float32"]
    common.say(common.table(head, rows))
    common.write_figures(options.json, {"export": figures})
    return 0


if __name__ == "__main__":
    common.start(main)
