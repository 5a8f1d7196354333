"""What the benchmarks share: children watched while they run, folders of links, tables, facts."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil

from pomona.backbone.weights import default
from pomona.core.errors import PomonaError, RequestError, first_line
from pomona.core.files import write_json
from pomona.core.provenance import versions
from pomona.photos.listing import list_files
from pomona.photos.source import arrange, open_source

Result = TypeVar("Result")

SAMPLE_SECONDS = 0.05
SAMPLES_PER_SEARCH = 5
"""New processes are looked for at every fifth sample: a walk over the process table costs 2 ms."""
SAMPLES_PER_SHARE = 10
"""USS and PSS walk the page tables, so they are taken at every tenth sample only."""

MB = 1_000_000


# --- memory ------------------------------------------------------------------------------------


@dataclass
class Peak:
    """The most that one process held, in bytes. ``uss`` and ``pss`` are 0 where not to be had."""

    role: str  # driver, jvm, daemon, worker, other
    rss: int = 0
    uss: int = 0
    pss: int = 0


@dataclass
class Peaks:
    """The peaks of a process and all below it; ``total`` is the most RSS at one time, summed."""

    processes: list[Peak] = field(default_factory=list)
    total: int = 0

    def of(self, role: str) -> Peak:
        """Return the largest figures among the processes of a role."""
        mine = [peak for peak in self.processes if peak.role == role]
        return Peak(role, *(max((getattr(p, k) for p in mine), default=0) for k in _KINDS))

    def figures(self) -> dict[str, Any]:
        """Return what goes into JSON, in MB."""
        found: dict[str, Any] = {"total_rss_mb": megabytes(self.total)}
        for role in ("driver", "jvm", "worker"):
            found[role] = in_megabytes(self.of(role))
        found["workers"] = [in_megabytes(p) for p in self.processes if p.role == "worker"]
        return found


_KINDS = ("rss", "uss", "pss")


def megabytes(count: int) -> float:
    """Return bytes as MB, one decimal."""
    return round(count / MB, 1)


def in_megabytes(peak: Peak) -> dict[str, float]:
    """Return a peak's figures in MB."""
    return {f"{kind}_mb": megabytes(getattr(peak, kind)) for kind in _KINDS}


class Watch:
    """Sample the memory of a process and of all below it, from a thread, until the block ends."""

    def __init__(self, pid: int) -> None:
        self.peaks = Peaks()
        self._root = psutil.Process(pid)
        self._known: dict[Any, Peak] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample_on, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self.peaks

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.peaks.processes = list(self._known.values())

    def _sample_on(self) -> None:
        number = 0
        while not self._over.wait(SAMPLE_SECONDS):
            if number % SAMPLES_PER_SEARCH == 0:
                self._search()
            share = number % SAMPLES_PER_SHARE == 0
            now = sum(_sample(process, peak, share) for process, peak in self._known.items())
            self.peaks.total = max(self.peaks.total, now)
            number += 1

    def _search(self) -> None:
        with contextlib.suppress(psutil.Error):
            for process in [self._root, *self._root.children(recursive=True)]:
                # A role may change: the JVM is a shell script before it is Java.
                known = self._known.setdefault(process, Peak("other"))
                if known.role == "other":
                    known.role = _role(process, self._root)


def _role(process: Any, root: Any) -> str:
    if process == root:
        return "driver"
    with contextlib.suppress(psutil.Error):
        if process.name() == "java":
            return "jvm"
        if _is_daemon(process):
            # Workers are forks of the daemon and have its command line.
            return "worker" if _is_daemon(process.parent()) else "daemon"
        if "LokyProcess" in " ".join(process.cmdline()):
            return "worker"
    return "other"


def _is_daemon(process: Any) -> bool:
    return process is not None and "pyspark.daemon" in process.cmdline()


def _sample(process: Any, peak: Peak, share: bool) -> int:
    """Update a process's peak; return its RSS now, 0 when it has ended."""
    try:
        rss = int(process.memory_info().rss)
        peak.rss = max(peak.rss, rss, _high_water(process.pid))
        if share:
            full = process.memory_full_info()
            peak.uss = max(peak.uss, int(getattr(full, "uss", 0)))
            peak.pss = max(peak.pss, int(getattr(full, "pss", 0)))
    except (psutil.Error, OSError):
        return 0
    return rss


def _high_water(pid: int) -> int:
    """Return Linux's own record of the RSS peak, which sampling can't miss; 0 elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


# --- children ----------------------------------------------------------------------------------


class Ran(NamedTuple):
    """A command that ended: its JSON, its seconds from start to end, its memory."""

    answer: dict[str, Any]
    seconds: float
    peaks: Peaks


def run_command(command: Sequence[str]) -> Ran:
    """Run a command that prints one line of JSON at its end, and watch its memory.

    Raises
    ------
    RequestError
        With the last line of what it wrote to stderr, if it fails.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(list(command), stdout=told, stderr=errors, text=True)
        try:
            with Watch(child.pid) as peaks:
                code = child.wait()
        finally:
            _end(child)
        seconds = time.perf_counter() - start
        told.seek(0)
        errors.seek(0)
        lines = told.read().strip().splitlines()
        if code != 0 or not lines:
            why = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
            raise RequestError(f"a child ended with code {code}: {why}")
    return Ran(json.loads(lines[-1]), seconds, peaks)


def _end(child: subprocess.Popen[str]) -> None:
    """Stop a child that still runs, after Ctrl-C here. Pomona ends its JVM when told so."""
    if child.poll() is None:
        child.terminate()
        child.wait(30)


def run_pomona(*words: str | Path) -> Ran:
    """Run the command ``pomona WORDS --json``."""
    return run_command([sys.executable, "-m", "pomona", *map(str, words), "--json"])


def weights_words(weights: str | None) -> tuple[str, ...]:
    """Return ``--weights`` for a command line, or nothing where the default is meant."""
    return ("--weights", weights) if weights else ()


def run_function(function: Callable[..., Result], *args: Any) -> tuple[Result, Peaks]:
    """Call a function of a module in a new process, and watch its memory.

    Raises
    ------
    RequestError
        If it raises, or the process dies.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(theirs, function, args))
    child.start()
    theirs.close()
    assert child.pid is not None
    try:
        with Watch(child.pid) as peaks:
            try:
                failure, result = ours.recv()
            except EOFError:
                failure, result = "it died", None
            child.join()
    finally:
        if child.is_alive():
            child.terminate()
            child.join(30)
    if failure:
        raise RequestError(f"{function.__name__} failed in its process: {failure}")
    return result, peaks


def _answer(to: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        to.send((None, function(*args)))
    except Exception as error:  # noqa: BLE001 - the parent tells it
        to.send((f"{type(error).__name__}: {first_line(error)}", None))


# --- photos ------------------------------------------------------------------------------------


def list_photos(source: Path) -> list[str]:
    """Return the photos of a local folder as relative paths, in the order of `sources.arrange`."""
    listing = list_files(open_source(source))
    paths: list[str] = arrange(listing.files)["path"].to_pylist()
    if not paths:
        raise RequestError(f"{source} holds no photos")
    return paths


def spread(source: Path, count: int) -> list[Path]:
    """Return up to so many photos of the split Test, or of all where there is none, evenly."""
    paths = list_photos(source)
    paths = [path for path in paths if path.startswith("Test/")] or paths
    count = min(count, len(paths))
    return [source / paths[number * len(paths) // count] for number in range(count)]


def link_photos(source: Path, dest: Path, count: int) -> None:
    """Make a folder of links to so many photos, evenly spread over the source.

    Where the source has fewer, its photos come again under other names.
    """
    paths = list_photos(source)
    for number in range(count):
        turn, place = divmod(number, len(paths))
        path = Path(paths[place] if count > len(paths) else paths[number * len(paths) // count])
        to = dest / path.with_stem(f"{path.stem}_copy{turn}" if turn else path.stem)
        to.parent.mkdir(parents=True, exist_ok=True)
        _link((source / path).resolve(), to)


def _link(photo: Path, to: Path) -> None:
    try:
        os.link(photo, to)
    except OSError:  # another disk
        to.symlink_to(photo)


def read_once(source: Path) -> None:
    """Read all photos, so that the first contender doesn't pay for filling the page cache."""
    for path in list_photos(source):
        (source / path).read_bytes()


# --- the terminal ------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a plain table: the first column flush left, figures flush right."""
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(line[n]) for line in cells) for n in range(len(head))]
    lines = [
        "  ".join(
            c.rjust(w) if n else c.ljust(w)
            for n, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def say(text: str) -> None:
    """Tell on stderr what goes on: stdout is for the table."""
    print(text, file=sys.stderr, flush=True)


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure over the rounds."""
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


# --- the file of figures -----------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return what figures depend on beside the code."""
    cpus = getattr(os, "sched_getaffinity", None)
    return {
        "cores": len(cpus(0)) if cpus else os.cpu_count(),
        "cpu": _cpu(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_figures(path: Path | None, figures: dict[str, Any]) -> None:
    """Write the figures with the machine's facts, if a file is wanted."""
    if path is not None:
        write_json(path, {**_plain(figures), "machine": machine()})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Peaks):
        return value.figures()
    if isinstance(value, Peak):
        return asdict(value)
    return float(f"{value:.10g}") if isinstance(value, float) else value


# --- the command line --------------------------------------------------------------------------


def parser(text: str | None) -> argparse.ArgumentParser:
    """Return a parser with ``--json``."""
    found = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return found


def add_source(found: argparse.ArgumentParser) -> None:
    """Add ``SOURCE`` and ``--weights``."""
    found.add_argument("source", type=Path, metavar="SOURCE", help="a local folder of photos")
    add_weights(found)


def add_weights(found: argparse.ArgumentParser) -> None:
    """Add ``--weights``."""
    text = "a .safetensors, .pth or .onnx file, or random:SEED (default: POMONA_WEIGHTS)"
    found.add_argument("--weights", metavar="W", default=default(), help=text)


def add_rounds(found: argparse.ArgumentParser, rounds: int) -> None:
    """Add ``--rounds``."""
    text = f"times that each contender runs, in turn; medians are shown (default: {rounds})"
    found.add_argument("--rounds", type=positive, default=rounds, metavar="R", help=text)


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder for links and results (under TMPDIR), removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="pomona-benchmark-") as folder:
        yield Path(folder)


def start(main: Callable[[], int]) -> None:
    """Run a benchmark: errors become one line."""
    signal.signal(signal.SIGTERM, _interrupt)  # so that children and links go with us
    try:
        sys.exit(main())
    except PomonaError as error:
        say(f"{Path(sys.argv[0]).name}: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say(f"{Path(sys.argv[0]).name}: stopped")
        sys.exit(130)


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)
