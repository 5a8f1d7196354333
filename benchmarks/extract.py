"""Photos to features: Pomona beside the notebook's way, and beside what the machine can do.

notebook          Spark local[2], binaryFile, pandas UDF, PyTorch eager (notebook.py)
pomona            pomona extract, in processes; from the list of photos to the parts, without the
                  workers' start; "wall" is the whole command
pomona on Spark   the same with --master local[2]
pomona's function the same function in two plain processes, results thrown away
bare ONNX Runtime the same network on pixels in memory, two processes of one thread, no decoding

The notebook gets few photos, for it is slow, and Pomona on Spark runs once on those same photos
too: the start of Spark's workers weighs more there. The others run in turn, in rounds. Features of
the notebook and of Pomona are compared photo by photo.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

import common
from pomona.backbone import extract
from pomona.backbone.extract import features_of
from pomona.backbone.spec import BackboneSpec, make_spec
from pomona.backbone.weights import load_weights
from pomona.core.errors import RequestError
from pomona.core.parquet import sliced
from pomona.photos.listing import list_files
from pomona.photos.reading import read
from pomona.photos.source import Source, arrange, open_source

NOTEBOOK = "notebook"
HERE = "pomona"
SPARK = "pomona on Spark"
FEW = "pomona on Spark, notebook's photos"
FUNCTION = "pomona's function"
BARE = "bare ONNX Runtime"

PROCESSES = 2
BATCH = 8
START_SECONDS = 300
WANTED_COSINE = 0.9999

Vectors = dict[str, npt.NDArray[np.float32]]


# --- two plain processes -----------------------------------------------------------------------


def read_and_extract(share: pa.Table, source: Source, spec: BackboneSpec) -> Iterator[None]:
    """Warm the session, give way for the barrier, then work."""
    extract.load_network(spec)(blank(spec))
    yield
    rows = share.combine_chunks().to_batches()[0]
    for _ in extract.extract(read(sliced([rows], BATCH), source), spec):
        pass


def run_network(share: pa.Table, source: Source, spec: BackboneSpec) -> Iterator[None]:
    """As `read_and_extract`, with pixels that are there already. ``source`` is not used."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(spec.payload, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    pixels = np.random.default_rng(0).integers(0, 256, blank(spec).shape, np.uint8)
    session.run(None, {name: pixels})
    yield
    for at in range(0, share.num_rows, BATCH):
        session.run(None, {name: pixels[: share.num_rows - at]})


def blank(spec: BackboneSpec) -> npt.NDArray[np.uint8]:
    return np.zeros((BATCH, spec.image_size, spec.image_size, 3), np.uint8)


def in_step(number: int, work: Any, barrier: Any, ends: Any, *args: Any) -> None:
    """Run a contender in this process: ready, all at once, done. Runs in a child."""
    try:
        steps = work(*args)
        next(steps)
        barrier.wait()
        next(steps, None)
        ends[number] = time.time()
    except BaseException:
        barrier.abort()
        raise


def rate_in_processes(
    work: Any, source: Path, spec: BackboneSpec, processes: int = PROCESSES
) -> float:
    """Return photos per second of some processes, each with its share of the photos."""
    where = open_source(source)
    photos = arrange(list_files(where).files)
    context = multiprocessing.get_context("spawn")
    barrier, ends = context.Barrier(processes + 1), context.Array("d", processes)
    children = []
    for number in range(processes):
        share = photos.take(pa.array(range(number, photos.num_rows, processes)))
        args = (number, work, barrier, ends, share, where, spec)
        children.append(context.Process(target=in_step, args=args, daemon=True))
        children[-1].start()
    start = 0.0
    with contextlib.suppress(threading.BrokenBarrierError):
        barrier.wait(START_SECONDS)
        start = time.time()
    for child in children:
        child.join()
    if not start or any(child.exitcode for child in children):
        raise RequestError("a process of the benchmark failed; its traceback is above")
    return int(photos.num_rows) / (max(float(end) for end in ends[:]) - start)


# --- the command -------------------------------------------------------------------------------


def run_pomona(
    name: str, source: Path, out: Path, weights: str
) -> tuple[dict[str, float], common.Peaks]:
    """Return photos per second without and with the workers' start, and the memory."""
    engine = ("--master", "local[2]") if name == SPARK else ("--workers", str(PROCESSES))
    words = ("--weights", weights, "--device", "cpu", "--max-error-rate", "1", *engine)
    ran = common.run_pomona("extract", source, "--out", out, *words)
    record = ran.answer["extract"]
    times = record["times"]
    rates = {name: times["photos_per_second"], f"{name}, wall": record["photos"] / ran.seconds}
    return rates, ran.peaks


def run_notebook(source: Path, out: Path, weights: str) -> float:
    """Return photos per second of the notebook's way, without Spark's start."""
    script = Path(__file__).with_name("notebook.py")
    ran = common.run_command(
        [sys.executable, str(script), str(source), str(out), "--weights", weights]
    )
    return int(pq.read_table(out, columns=["label"]).num_rows) / float(ran.answer["seconds"])


# --- agreement ---------------------------------------------------------------------------------


def notebook_vectors(source: Path, out: Path) -> Vectors:
    """Read the notebook's features by path relative to the source."""
    rows = pq.read_table(out)
    names = [relative(uri, source) for uri in rows["path"].to_pylist()]
    return dict(zip(names, features_of(rows["features"]), strict=True))


def relative(uri: str, source: Path) -> str:
    """Return a path as Pomona names it, from one as ``binaryFile`` does: a URI, encoded or not."""
    plain = uri.removeprefix("file:").replace("//", "/")
    if not Path(plain).exists():
        plain = unquote(urlsplit(uri).path)
    return Path(plain).relative_to(source.resolve()).as_posix()


def pomona_vectors(out: Path) -> Vectors:
    """Read Pomona's features by path."""
    rows = pq.read_table(out / "features", columns=["path", "features"])
    rows = rows.filter(rows["features"].is_valid())
    return dict(zip(rows["path"].to_pylist(), features_of(rows["features"]), strict=True))


def compare(ours: Vectors, theirs: Vectors) -> dict[str, float]:
    """Compare each of the notebook's vectors with Pomona's of the same photo."""
    missing = [path for path in theirs if path not in ours]
    if missing:
        raise RequestError(
            f"{len(missing)} of the notebook's photos have no features: {missing[0]}"
        )
    a = np.stack([ours[path] for path in theirs]).astype(np.float64)
    b = np.stack(list(theirs.values())).astype(np.float64)
    cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return {
        "photos": len(a),
        "min_cosine": float(cosines.min()),
        "median_cosine": float(np.median(cosines)),
        "largest_difference": float(np.abs(a - b).max()),
    }


# --- the benchmark -----------------------------------------------------------------------------


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all contenders and return the figures."""
    photos, few = options.source.resolve(), folder / "few"
    if options.photos:
        photos = folder / "photos"
        common.link_photos(options.source, photos, options.photos)
    count = len(common.list_photos(photos))
    common.link_photos(photos, few, min(options.notebook_photos, count))
    common.read_once(photos)
    spec = make_spec(load_weights(options.weights), device="cpu", batch_size=BATCH)
    common.say(f"{NOTEBOOK}: {min(options.notebook_photos, count):,} photos")
    notebook = run_notebook(few, folder / "notebook", options.weights)
    on_few = run_pomona(SPARK, few, folder / "few_out", options.weights)[0][SPARK]
    rounds: list[dict[str, float]] = []
    memory: list[common.Peaks] = []
    for number in range(options.rounds):
        common.say(f"round {number + 1} of {options.rounds}: {count:,} photos, four contenders")
        rates, peaks = run_pomona(HERE, photos, folder / f"out{number}", options.weights)
        rates |= run_pomona(SPARK, photos, folder / f"spark{number}", options.weights)[0]
        rates[FUNCTION] = rate_in_processes(read_and_extract, photos, spec)
        rates[BARE] = rate_in_processes(run_network, photos, spec)
        rounds.append(rates)
        memory.append(peaks)
    theirs = notebook_vectors(few, folder / "notebook")
    rates = {NOTEBOOK: notebook, FEW: on_few, **common.medians(rounds)}
    return {
        "photos": count,
        "photos_per_second": rates,
        "rounds": rounds,
        "ratios": {
            f"{a} / {b}": rates[a] / rates[b]
            for a, b in (
                *((HERE, FUNCTION), (SPARK, FUNCTION), (FUNCTION, BARE)),
                *((HERE, NOTEBOOK), (SPARK, NOTEBOOK), (FEW, NOTEBOOK)),
            )
        },
        "agreement": compare(pomona_vectors(folder / "out0"), theirs),
        "memory": max(memory, key=lambda peaks: peaks.of("worker").rss),
    }


def show(figures: dict[str, Any]) -> None:
    """Print the tables."""
    rates = figures["photos_per_second"]
    print(common.table(("contender", "photos/s"), rates.items()))
    print()
    print(common.table(("ratio", ""), figures["ratios"].items()))
    alike = figures["agreement"]
    wanted = "yes" if alike["min_cosine"] >= WANTED_COSINE else "NO"
    print(
        f"\nthe notebook's features and Pomona's, {alike['photos']:,} photos: cosine at least "
        f"{alike['min_cosine']:.9f}, median {alike['median_cosine']:.9f}, largest difference "
        f"{alike['largest_difference']:.1e}\ncosine >= {WANTED_COSINE}: {wanted}\n"
    )
    workers = [peak for peak in figures["memory"].processes if peak.role == "worker"]
    rows = [
        (f"worker {n + 1}", *(common.megabytes(v) for v in (p.rss, p.uss, p.pss)))
        for n, p in enumerate(workers)
    ]
    print(common.table(("peak memory of pomona", "RSS MB", "USS MB", "PSS MB"), rows))


def main() -> int:
    parser = common.parser(__doc__)
    common.add_source(parser)
    parser.add_argument(
        "--photos", type=common.positive, metavar="N", help="take N photos, evenly (default: all)"
    )
    parser.add_argument(
        "--notebook-photos",
        type=common.positive,
        default=600,
        metavar="N",
        help="photos for the notebook, which is slow (default: 600)",
    )
    common.add_rounds(parser, 1)
    options = parser.parse_args()
    with common.scratch() as folder:
        figures = measure(options, folder)
    show(figures)
    common.write_figures(options.json, figures)
    return 0


if __name__ == "__main__":
    common.start(main)
