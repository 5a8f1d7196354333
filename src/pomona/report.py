"""Pictures. Needs matplotlib (extra ``report``)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pomona.errors import MissingError
from pomona.projection import Projection, count_for


def check_matplotlib() -> None:
    """Raise MissingError, with the remedy, if there is nothing to draw with."""
    if find_spec("matplotlib") is None:
        raise MissingError(
            "pictures need matplotlib: pip install 'pomona[report]', or add --no-plots"
        )


def plot_variance(projection: Projection, path: Path) -> None:
    """Draw the variance of each component and of the first so many, with lines at 95 % and 99 %."""
    from matplotlib.figure import Figure

    ratio = projection.explained_variance_ratio
    kept = np.cumsum(ratio)
    k = projection.k
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    each, together = figure.subplots(1, 2)
    shown = min(len(ratio), max(k, 10))
    each.bar(np.arange(1, shown + 1), 100 * ratio[:shown], color="#5b8c3a")
    each.set(xlabel="component", ylabel="% of variance", title=f"Each of the first {shown}")
    together.plot(np.arange(1, len(kept) + 1), 100 * kept, color="#b03a2e", lw=2)
    for share, below in ((0.95, -11), (0.99, 3)):
        needs = count_for(ratio, share)
        together.axhline(100 * share, color="grey", lw=0.8, ls="--")
        note = f"{share:.0%}: {needs} components"
        together.annotate(
            note,
            (len(kept), 100 * share),
            (0, below),
            textcoords="offset points",
            ha="right",
            size=9,
        )
    together.plot(k, 100 * projection.kept, "o", color="#1f4e79")
    together.annotate(
        f"{k} components: {projection.kept:.1%}",
        (k, 100 * projection.kept),
        (10, -14),
        textcoords="offset points",
        color="#1f4e79",
    )
    together.set(xlabel="components", ylabel="% of variance", ylim=(0, 106), title="Cumulative")
    for axes in (each, together):
        axes.spines[["top", "right"]].set_visible(False)
    kind = "standardised" if projection.scaled else "unscaled"
    figure.suptitle(f"Variance kept by PCA ({kind} features, {projection.count:,} Training photos)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
