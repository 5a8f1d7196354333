"""Time and memory of ``pomona run`` as the number of photos grows, with a picture.

Photos are rendered once into DIR; each step takes a stratified share of them, runs in a child, and
is written to DIR/scaling.json as soon as it is done. Steps that are there are not run again, so a
benchmark that was killed goes on.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
from pomona.core.errors import RequestError
from pomona.core.files import read_json
from pomona.photos import synthetic
from pomona.photos.listing import list_files
from pomona.photos.source import open_source
from pomona.photos.subset import subset

CLASSES = 131
STAGES = ("list", "spark", "extract", "table", "reduce")
COLOURS = {"driver": "#1f4e79", "jvm": "#b03a2e", "worker": "#5b8c3a"}


# --- steps -------------------------------------------------------------------------------------


def synthesize(folder: Path, images: int) -> float:
    """Render the photos and return the seconds."""
    start = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    synthetic.synthesize(folder, classes=CLASSES, images=images, progress=every_tenth())
    return time.perf_counter() - start


def every_tenth() -> Callable[[int, int], None]:
    """Return a progress function that speaks ten times."""
    told = 0

    def tell(done: int, total: int) -> None:
        nonlocal told
        if done * 10 // total > told:
            told = done * 10 // total
            common.say(f"rendered {done:,} of {total:,} photos")

    return tell


def run_step(photos: Path, work: Path, percentage: float, weights: str) -> dict[str, Any]:
    """Run one share of the photos and return its figures."""
    shutil.rmtree(work, ignore_errors=True)
    source = open_source(photos)
    count = subset(source, list_files(source), work / "photos", percentage)
    common.say(f"{percentage:g} %: {count:,} photos")
    ran = common.run_pomona(
        "run", work / "photos", "--out", work / "out", "--weights", weights, "--no-mlflow"
    )
    shutil.rmtree(work)
    extract, reduce = (ran.answer[name]["times"] for name in ("extract", "reduce"))
    seconds = {**extract["seconds"], "reduce": sum(reduce["seconds"].values())}
    return {
        "photos": count,
        "seconds": ran.seconds,
        "stages": {name: seconds.get(name, 0.0) for name in STAGES},
        "photos_per_second": count / ran.seconds,
        "extract_photos_per_second": extract["photos_per_second"],
        "memory": ran.peaks.figures(),
    }


def start_afresh(out: Path, images: int) -> None:
    """Make DIR, which must be ours alone: photos and results in it are replaced."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise RequestError(f"{out} is not empty and holds no scaling.json: choose another --out")
    common.write_figures(out / "scaling.json", {"images": images, "steps": {}})


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the steps that are not there, and return the figures of all."""
    file = options.out / "scaling.json"
    if not file.exists():
        start_afresh(options.out, options.images)
    figures = read_json(file)
    if figures["images"] != options.images:
        raise RequestError(
            f"{options.out} holds steps of {figures['images']:,} photos: choose another --out, "
            f"or add --images {figures['images']}"
        )
    todo = [step for step in options.steps if f"{step:g}" not in figures["steps"]]
    photos = options.out / "photos"
    if todo and not (photos.is_dir() and "synthesize_seconds" in figures):
        figures["synthesize_seconds"] = synthesize(photos, options.images)
        common.write_figures(file, figures)
    for step in todo:
        figures["steps"][f"{step:g}"] = run_step(
            photos, options.out / "_work", step, options.weights
        )
        common.write_figures(file, figures)
    return figures


# --- results -----------------------------------------------------------------------------------


def by_size(figures: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return sorted(figures["steps"].items(), key=lambda item: float(item[0]))


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    rows = []
    for name, step in by_size(figures):
        memory = [step["memory"][role]["rss_mb"] for role in COLOURS]
        seconds = [round(step["stages"][stage], 1) for stage in STAGES]
        rates = (round(step["photos_per_second"], 1), step["extract_photos_per_second"])
        whole = round(step["seconds"], 1)
        rows.append((f"{name} %", step["photos"], whole, *rates, *seconds, *memory))
    head = ("share", "photos", "s", "photos/s", "in extract", *(f"{s} s" for s in STAGES))
    print(common.table((*head, "driver MB", "JVM MB", "worker MB"), rows))


def plot(figures: dict[str, Any], path: Path) -> None:
    """Draw time, photos per second and memory over the number of photos."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    steps = [step for _, step in by_size(figures)]
    photos = [step["photos"] for step in steps]
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    times, rates, memory = figure.subplots(1, 3)
    seconds = [step["seconds"] for step in steps]
    linear = [seconds[-1] * count / photos[-1] for count in photos]
    times.plot(photos, linear, "--", color="grey", label="linear, through the last")
    times.plot(photos, seconds, "o-", color="#1f4e79", label="pomona run")
    times.set(yscale="log", ylabel="seconds", title="Time, Spark's start included")
    times.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    times.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    times.yaxis.set_minor_locator(NullLocator())
    rates.plot(
        photos, [s["extract_photos_per_second"] for s in steps], "o-", color="#5b8c3a",
        label="in extract",
    )  # fmt: skip
    rates.plot(photos, [p / s for p, s in zip(photos, seconds, strict=True)], "o-",
               color="#1f4e79", label="whole run")  # fmt: skip
    rates.set(ylabel="photos per second", title="Rate", ylim=(0, None))
    for role, colour in COLOURS.items():
        label = {"jvm": "JVM", "worker": "largest Python worker"}.get(role, role)
        peaks = [step["memory"][role]["rss_mb"] for step in steps]
        memory.plot(photos, peaks, "o-", color=colour, label=label)
    memory.set(ylabel="peak RSS, MB", title="Memory", ylim=(0, None))
    for axes in (times, rates, memory):
        axes.set(xscale="log", xlabel="photos")
        axes.set_xticks(photos)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(axis="x", rotation=30)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


# --- the command line --------------------------------------------------------------------------


def percentages(text: str) -> list[float]:
    """Read ``1,5,100``, smallest first."""
    found = sorted({float(word) for word in text.split(",")})
    if not 0 < found[0] <= found[-1] <= 100:
        raise argparse.ArgumentTypeError(f"{text}: percentages are above 0 and up to 100")
    return found


def main() -> int:
    parser = common.parser(__doc__)
    common.add_weights(parser)
    parser.add_argument(
        "--images",
        type=common.positive,
        default=90_483,
        metavar="N",
        help="photos to render (default: 90483, as many as Fruits-360 has)",
    )
    parser.add_argument(
        "--steps",
        type=percentages,
        default=[1, 5, 10, 25, 50, 100],
        metavar="P,…",
        help="percentages to run (default: 1,5,10,25,50,100)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/scaling"),
        metavar="DIR",
        help="takes photos, scaling.json and scaling.png (default: out/scaling)",
    )
    options = parser.parse_args()
    figures = measure(options)
    show(figures)
    plot(figures, options.out / "scaling.png")
    common.write_figures(options.json, figures)
    return 0


if __name__ == "__main__":
    common.start(main)
