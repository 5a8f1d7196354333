"""Pomona beside Daft and Ray Data: whole processes, from the command to the table of features.

Each peer gets an environment of its own, made by this script (in --environments, to keep them), and
the same ONNX file, decodes with Pillow and infers in as many processes of one thread. What a peer
can't install or finish is said. They run in turn, in rounds; medians are shown.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds

import common
from pomona.backbone.spec import make_spec
from pomona.backbone.weights import load_weights
from pomona.core.cpus import available_cpus
from pomona.core.errors import RequestError
from pomona.core.provenance import versions

PEERS = {"daft": "daft==0.7.26", "ray": "ray[data]>=2.40"}
NEEDS = ("numpy", "onnxruntime", "pillow", "pyarrow")
POMONA = "pomona"
SECONDS = 1800
"""After so long a peer is stopped."""


def make_environment(folder: Path, requirement: str) -> Path:
    """Return the Python of an environment with a peer in it, in the versions that Pomona has here.

    Raises RequestError if the peer can't be installed.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    ours = versions()
    pins = [f"{name}=={ours[name]}" if name in ours else name for name in NEEDS]
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", requirement, *pins],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RequestError(f"{requirement} can't be installed: {last_line(done.stderr)}")
    return python


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1][:300]


def run_peer(python: Path, name: str, photos: Path, model: Path, out: Path, count: int) -> float:
    """Return the seconds of a peer's whole process; a RequestError if it fails."""
    script = Path(__file__).with_name(f"peer_{name}.py")
    words = [str(python), str(script), str(photos), str(model), str(out), str(available_cpus())]
    environment = os.environ | {"PYTHONPATH": str(script.parent)}  # for peer_network
    start = time.perf_counter()
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise RequestError(f"{name} was stopped after {SECONDS} s") from error
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RequestError(f"{name} failed: {last_line(done.stderr)}")
    check_rows(out, count)
    return seconds


def check_rows(out: Path, count: int) -> None:
    rows = ds.dataset(out, format="parquet").count_rows()
    if rows != count:
        raise RequestError(f"{out.name} has {rows:,} rows for {count:,} photos")


def run_pomona(photos: Path, out: Path, weights: str, count: int) -> float:
    words = ("--weights", weights, "--device", "cpu", "--max-error-rate", "1")
    ran = common.run_pomona("extract", photos, "--out", out, *words)
    check_rows(out / "features", count)
    return ran.seconds


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all contenders and return the figures."""
    photos = folder / "photos"
    common.link_photos(options.source, photos, options.photos)
    count = len(common.list_photos(photos))
    common.read_once(photos)
    model = folder / "model.onnx"
    model.write_bytes(make_spec(load_weights(options.weights), device="cpu").payload)
    pythons, failures = {}, {}
    for name in options.peers:
        try:
            where = (options.environments or folder) / name
            pythons[name] = make_environment(where, PEERS[name])
        except RequestError as error:
            failures[name] = str(error)
    rounds: list[dict[str, float]] = []
    for number in range(options.rounds):
        common.say(f"round {number + 1} of {options.rounds}: {count:,} photos")
        rates = {POMONA: count / run_pomona(photos, folder / f"p{number}", options.weights, count)}
        for name, python in pythons.items():
            try:
                seconds = run_peer(python, name, photos, model, folder / f"{name}{number}", count)
                rates[name] = count / seconds
            except RequestError as error:
                failures[name] = str(error)
        pythons = {name: python for name, python in pythons.items() if name in rates}
        rounds.append(rates)
    rates = common.medians([{k: r[k] for k in (POMONA, *pythons)} for r in rounds])
    ratios = {f"{POMONA} / {name}": rates[POMONA] / rates[name] for name in pythons}
    return {
        "photos": count,
        "photos_per_second": rates,
        "rounds": rounds,
        "ratios": ratios,
        "failures": failures,
    }


def main() -> int:
    parser = common.parser(__doc__)
    common.add_source(parser)
    parser.add_argument("--photos", type=common.positive, default=7058, metavar="N")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--environments", type=Path, metavar="FOLDER", help="keep them there")
    common.add_rounds(parser, 3)
    options = parser.parse_args()
    with common.scratch() as folder:
        figures = measure(options, folder)
    print(common.table(("whole process", "photos/s"), figures["photos_per_second"].items()))
    print()
    print(common.table(("ratio", ""), figures["ratios"].items()))
    for failure in figures["failures"].values():
        print(failure)
    common.write_figures(options.json, figures)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    common.start(main)
