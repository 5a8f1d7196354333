"""``OUT/report/report.html``: all about a run on one page that needs no network."""

from __future__ import annotations

import colorsys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pomona.core.files import read_json, write_text
from pomona.model.pca_table import Photos
from pomona.model.projection import load_projection
from pomona.model.sampling import pick_evenly
from pomona.pipeline import report_figures
from pomona.pipeline.status import stale_stages
from pomona.workspace import feature_table
from pomona.workspace.layout import Out

ON_MAP = 1000
"""Photos: t-SNE takes seconds, and their thumbnails half a megabyte."""
THUMBNAIL, COLUMNS = 48, 32
PICTURE = 100
REJECTED_SHOWN = 24
PAIRS_SHOWN = 12
LABELS_SHOWN = 30
"""Above, tables show the worst labels, and the rest folded."""


def write(out: Out, training: Photos, test: Photos, source: str | None = None) -> Path:
    """Write the page from what there is in OUT and the PCA tables, or samples, and return its path.

    The source is its URI with its options, where it is known; OUT holds it without them.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("pomona.pipeline"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"pc": lambda x: "–" if x is None else f"{100 * x:.1f} %"}
    page = environment.get_template("report.html").render(facts(out, training, test, source))
    path = out.report / "report.html"
    write_text(path, page)
    return path


def facts(out: Out, training: Photos, test: Photos, source: str | None) -> dict[str, Any]:
    """Return all that the template shows."""
    table = read_json(out.table_file)
    stages = read_json(out.manifest).get("stages", {})
    metrics = read_json(out.metrics)
    projection = load_projection(out.projection)
    shown = {
        "source": Path(table["source"]).name,
        "untrained": table["weights"].startswith("random:"),
        "fruits_360": "fruits" in table["source"].lower() and "360" in table["source"],
        "table": table,
        "stages": stages,
        "stale": next(iter(stale_stages(out, stages)), None),
        "labels": _labels(out),
        "rejected": _rejected(out),
        "variance": report_figures.svg(report_figures.variance(projection)),
        "projection": projection,
        "map": _map([part for part in (training, test) if len(part.labels)]),
        "metrics": metrics,
        "model": read_json(out.model / "model.json") if metrics else {},
        **(_of_model(metrics) if metrics else {}),
    }
    _add_pictures(shown, source or table["source"])
    return shown


def _add_pictures(shown: dict[str, Any], source: str) -> None:
    """Read each photo that is shown once; add ``pictures`` (URIs by path) and the map's sprite."""
    rows = [*shown["rejected"], *shown.get("mistakes", []), *shown.get("pairs", [])]
    paths = [row[side] for row in rows for side in ("path", "like") if side in row]
    on_map = [point[-1] for point in shown["map"]["data"]["points"]] if shown["map"] else []
    wanted = [*((path, PICTURE) for path in paths), *((path, THUMBNAIL) for path in on_map)]
    thumbnails = report_figures.read_thumbnails(source, wanted)
    shown["pictures"] = {
        path: report_figures.data_uri(thumbnails[path, PICTURE])
        for path in paths
        if (path, PICTURE) in thumbnails
    }
    if on_map:
        shown["map"]["sprite"] = report_figures.sprite(
            [thumbnails.get((path, THUMBNAIL)) for path in on_map], THUMBNAIL, COLUMNS
        )


def _labels(out: Out) -> list[tuple[str, int]]:
    """Count all photos by label, in the table of features: the PCA features may be a sample."""
    rows = feature_table.index(out, out.work / "none").rows
    counts = Counter(rows["label"].to_pylist())
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def _rejected(out: Out) -> list[dict[str, Any]]:
    if not out.rejected.exists():
        return []
    return list(feature_table.read_rejected(out.rejected)[:REJECTED_SHOWN].to_pylist())


def _map(parts: list[Photos]) -> dict[str, Any] | None:
    """Return t-SNE's places (van der Maaten and Hinton 2008) of some photos of each label."""
    labels = np.concatenate([part.labels for part in parts]).astype(str)
    chosen = pick_evenly(np.unique(labels, return_inverse=True)[1], ON_MAP)
    if len(chosen) < 5:
        return None
    places = _tsne(np.concatenate([part.z for part in parts])[chosen])
    paths = np.concatenate([part.paths for part in parts])[chosen]
    split = np.concatenate([np.full(len(part.labels), n) for n, part in enumerate(parts)])[chosen]
    names, codes = np.unique(labels[chosen], return_inverse=True)
    colours = [_colour(n, len(names)) for n in range(len(names))]
    return {
        "legend": list(zip(names.tolist(), colours, strict=True)),
        "photos": sum(part.of for part in parts),
        "data": {
            "size": THUMBNAIL,
            "columns": COLUMNS,
            "names": names.tolist(),
            "colours": colours,
            "points": [
                [round(float(x), 4), round(float(y), 4), int(code), int(s), str(path)]
                for (x, y), code, s, path in zip(places, codes, split, paths, strict=True)
            ],
        },
    }


def _tsne(z: Any) -> Any:
    """Return places [n, 2] between 0 and 1."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # see pomona.model.classifier.one_thread_each
        places = TSNE(
            init="pca" if z.shape[1] >= 2 else "random",
            perplexity=min(30, (len(z) - 1) / 3),
            random_state=0,
        ).fit_transform(z)
    low, high = places.min(axis=0), places.max(axis=0)
    return (places - low) / np.maximum(high - low, 1e-9)


def _colour(n: int, of: int) -> str:
    """Return a hue at a luminance with a contrast of 3 on the light page and on the dark one.

    Neighbours differ in luminance too, for those who see no hue.
    """
    low, high = 0.0, 1.0
    for _ in range(12):
        rgb = colorsys.hls_to_rgb(n / of, (low + high) / 2, 0.65)
        light = _luminance(rgb) > (0.27 if n % 2 else 0.155)
        low, high = (low, (low + high) / 2) if light else ((low + high) / 2, high)
    red, green, blue = (round(255 * part) for part in rgb)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _luminance(rgb: tuple[float, float, float]) -> float:
    """Return the relative luminance of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _of_model(metrics: dict[str, Any]) -> dict[str, Any]:
    test, cross = metrics.get("test") or {}, metrics.get("cross_validation") or {}
    judged = {"Test": test, "cross-validation": cross}
    judged = {name: part for name, part in judged.items() if "accuracy" in part}
    return {
        "judged": judged,
        "reliability": report_figures.svg(report_figures.reliability(judged)) if judged else None,
        "mistakes": test.get("mistakes", []),
        "per_label": sorted(
            test.get("per_label", []), key=lambda r: 2 if r["f1"] is None else r["f1"]
        ),
        "labels_shown": LABELS_SHOWN,
        "confusion": _confusion(test, metrics["labels"]),
        "pairs": (metrics.get("leakage") or {}).get("pairs", [])[:PAIRS_SHOWN],
    }


def _confusion(test: dict[str, Any], labels: list[str]) -> dict[str, Any] | None:
    """Return the matrix with each cell's share of its row, and the most frequent confusions."""
    if "confusion" not in test:
        return None
    counts = np.array(test["confusion"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    off = counts * (1 - np.eye(len(labels), dtype=int))
    order = np.argsort(-off, axis=None, kind="stable")[:20]
    return {
        "labels": labels,
        "rows": [
            [(int(c), round(float(s), 3)) for c, s in zip(row, share, strict=True)]
            for row, share in zip(counts, shares, strict=True)
        ],
        "most": [
            (labels[n // len(labels)], labels[n % len(labels)], int(off.flat[n]))
            for n in order
            if off.flat[n]
        ],
    }
