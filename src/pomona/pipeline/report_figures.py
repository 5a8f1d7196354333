"""The report's pictures: curves by matplotlib, thumbnails by Pillow. Needs the extra ``report``."""

from __future__ import annotations

import base64
import io
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pomona.core.cpus import available_cpus
from pomona.core.errors import MissingError, SourceError
from pomona.core.object_store import READ_AHEAD
from pomona.model.projection import Projection, count_for
from pomona.photos import isolation
from pomona.photos.reading import reader
from pomona.photos.source import open_readable

GREEN, RED, BLUE = "#5b8c3a", "#b03a2e", "#1f4e79"


def check_matplotlib() -> None:
    """Raise MissingError, with the remedy, if there is nothing to draw with."""
    for name in ("matplotlib", "jinja2", "sklearn"):
        if find_spec(name) is None:
            raise MissingError(
                f"pictures and the report need {name}: pip install 'pomona[report]', or add "
                "--no-plots"
            )


def plot_variance(projection: Projection, path: Path) -> None:
    """Draw each component's variance and the cumulative curve, with lines at 95 % and 99 %."""
    figure = variance(projection)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def variance(projection: Projection) -> Any:
    """Return the figure of `plot_variance`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    each, cumulative = figure.subplots(1, 2)
    ratio = projection.explained_variance_ratio
    shown = min(len(ratio), max(projection.k, 10))
    each.bar(np.arange(1, shown + 1), 100 * ratio[:shown], color=GREEN)
    each.set(xlabel="component", ylabel="% of variance", title=f"Each of the first {shown}")
    _plot_cumulative(cumulative, projection)
    for axes in (each, cumulative):
        axes.spines[["top", "right"]].set_visible(False)
    kind = "standardised" if projection.scaled else "unscaled"
    figure.suptitle(f"Variance kept by PCA ({kind} features, {projection.count:,} Training photos)")
    return figure


def _plot_cumulative(axes: Any, projection: Projection) -> None:
    ratio, k = projection.explained_variance_ratio, projection.k
    kept = np.cumsum(ratio)
    axes.plot(np.arange(1, len(kept) + 1), 100 * kept, color=RED, lw=2)
    for share, below in ((0.95, -11), (0.99, 3)):
        needs = count_for(ratio, share)
        axes.axhline(100 * share, color="grey", lw=0.8, ls="--")
        place, note = (len(kept), 100 * share), f"{share:.0%}: {needs} components"
        axes.annotate(note, place, (0, below), textcoords="offset points", ha="right", size=9)
    place, note = (k, 100 * projection.kept), f"{k} components: {projection.kept:.1%}"
    axes.plot(*place, "o", color=BLUE)
    axes.annotate(note, place, (10, -14), textcoords="offset points", color=BLUE)
    axes.set(xlabel="components", ylabel="% of variance", ylim=(0, 106), title="Cumulative")


def reliability(parts: dict[str, dict[str, Any]]) -> Any:
    """Return the reliability diagrams of metrics.json's parts, before and after the temperature."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(parts), 4.6), layout="constrained")
    all_axes = np.atleast_1d(figure.subplots(1, len(parts)))
    for axes, (name, part) in zip(all_axes, parts.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="grey", lw=0.8, ls="--")
        for key, words, colour in (
            ("reliability_before", "before", "grey"),
            ("reliability", "after the temperature", GREEN),
        ):
            rows = part[key]
            x, y = [[row[n] for row in rows] for n in ("confidence", "accuracy")]
            size = 200 * np.sqrt(np.array([r["photos"] for r in rows]) / part["photos"])
            axes.plot(x, y, color=colour, lw=1, zorder=1)
            axes.scatter(x, y, s=size, color=colour, alpha=0.8, label=words, zorder=2)
        axes.set(xlabel="highest probability", ylabel="share that was right", title=name)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.05))
        axes.legend(frameon=False, loc="lower right", markerscale=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def svg(figure: Any) -> str:
    """Return a figure as an SVG element, the same each time."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "pomona", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


Pixels = npt.NDArray[np.uint8]
DECODE_SECONDS = 10.0
"""Seconds for one photo, in a child process."""

PATIENCE = 15.0
"""Seconds that photos which can't be read may cost in all: an object store out of reach takes six
for each."""


def read_thumbnails(
    source: str, wanted: Iterable[tuple[str, int]]
) -> dict[tuple[str, int], Pixels]:
    """Read photos, each once, and scale them to squares of so many pixels. The source may be gone.

    Returns uint8 [size, size, 3] by path and size, without photos that can't be shown.
    """
    sizes: dict[str, set[int]] = {}
    for path, size in wanted:
        sizes.setdefault(path, set()).add(size)
    read = patient_reader(source)

    def scaled(path: str) -> list[tuple[tuple[str, int], Pixels | None]]:
        content = read(path)
        return [
            ((path, size), decoders.submit(_pixels, content, size).result())
            for size in sizes[path]
            if content
        ]

    # Each thread that decodes has a child process: fewer than those that wait for the source.
    with ThreadPoolExecutor(available_cpus()) as decoders, ThreadPoolExecutor(READ_AHEAD) as pool:
        thumbnails = itertools.chain.from_iterable(pool.map(scaled, sizes))
        return {key: pixels for key, pixels in thumbnails if pixels is not None}


def patient_reader(source: str) -> Callable[[str], bytes | None]:
    """Return a function that reads photos, and gives up once failures have cost `PATIENCE`."""
    try:
        read = reader(open_readable(source))
    except SourceError:
        return lambda path: None
    waited = 0.0

    def read_patiently(path: str) -> bytes | None:
        nonlocal waited
        if waited > PATIENCE:
            return None
        start = time.monotonic()
        try:
            return read(path)
        except (OSError, SourceError):
            waited += time.monotonic() - start
            return None

    return read_patiently


def _pixels(content: bytes, size: int) -> Pixels | None:
    """Return a photo, or as much of a damaged one as can be decoded.

    Photos that were rejected are among them, and may end or stall the process that decodes.
    """
    return isolation.decode_apart(content, size, seconds=DECODE_SECONDS, partial=True).pixels


def data_uri(pixels: Pixels, quality: int = 80) -> str:
    """Return pixels as a JPEG in a ``data:`` URI."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def sprite(thumbnails: Sequence[Pixels | None], size: int, columns: int) -> str:
    """Return one picture of many thumbnails, row by row; grey where one is missing."""
    rows = -(-len(thumbnails) // columns)
    sheet = np.full((rows * size, columns * size, 3), 200, np.uint8)
    for n, pixels in enumerate(thumbnails):
        if pixels is not None:
            y, x = size * (n // columns), size * (n % columns)
            sheet[y : y + size, x : x + size] = pixels
    return data_uri(sheet, 65)
