"""``OUT/report/report.html``: all about a run on one page that needs no network."""

from __future__ import annotations

import colorsys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pomona.core.files import read_json, write_text
from pomona.core.object_store import READ_AHEAD
from pomona.model import projection
from pomona.pipeline import report_figures
from pomona.pipeline.report_figures import Look
from pomona.workspace import feature_table
from pomona.workspace.layout import Out

ON_MAP = 1000
"""Photos: t-SNE takes seconds, and their thumbnails half a megabyte."""
THUMBNAIL, COLUMNS = 48, 32
PICTURE = 100
REJECTED_SHOWN = 24
PAIRS_SHOWN = 12
LABELS_SHOWN = 30
"""Above, tables show the worst, and the rest folded."""


def write(out: Out, *photos: Any, source: str | None = None) -> Path:
    """Write the page from what there is in OUT, and return its path.

    Parameters
    ----------
    photos
        Training and Test, or samples, with ``paths``, ``labels``, ``z`` and ``of``
        (`pomona.pipeline.train.Photos`).
    source
        The source's URI with its options, if it is known: OUT knows it without them.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("pomona.pipeline"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"pc": lambda x: "–" if x is None else f"{100 * x:.1f} %"}
    page = environment.get_template("report.html").render(facts(out, source, *photos))
    path = out.report / "report.html"
    write_text(path, page)
    return path


def facts(out: Out, source: str | None, *photos: Any) -> dict[str, Any]:
    """Return all that the template shows."""
    table = read_json(out.table_file)
    stages = read_json(out.manifest).get("stages", {})
    look = report_figures.looker(source or table["source"])
    metrics = read_json(out.metrics)
    about = read_json(out.model / "model.json") if metrics else {}
    found = projection.load_projection(out.projection)
    return {
        "source": Path(table["source"]).name,
        "untrained": table["weights"].startswith("random:"),
        "fruits_360": "fruits" in table["source"].lower() and "360" in table["source"],
        "table": table,
        "stages": stages,
        "stale": _stale(out, stages),
        "labels": _labels(out),
        "rejected": _rejected(out, look),
        "variance": report_figures.svg(report_figures.variance(found)),
        "projection": found,
        "map": _map(photos, look),
        "metrics": metrics,
        "model": about,
        **(_of_model(metrics, look) if metrics else {}),
    }


def _stale(out: Out, stages: dict[str, Any]) -> str | None:
    """Return the first command whose result is older than what it was made from."""
    reduced = stages.get("reduce", {})
    if reduced.get("made_from", {}).get("features") != feature_table.digest(out):
        return "reduce"
    inputs = stages.get("train", {}).get("made_from", {}).get("digests", {})
    return "train" if any(reduced["digests"].get(n) != d for n, d in inputs.items()) else None


def _labels(out: Out) -> list[tuple[str, int]]:
    """Count all photos by label, in the table of features: the PCA features may be a sample."""
    rows = feature_table.index(out, out.work / "none").rows
    counts = Counter(rows["label"].to_pylist())
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def _rejected(out: Out, look: Look) -> list[dict[str, Any]]:
    if not out.rejected.exists():
        return []
    rows = feature_table.read_rejected(out.rejected).slice(0, REJECTED_SHOWN).to_pylist()
    return [{**row, "picture": report_figures.data_uri(look(row["path"], PICTURE))} for row in rows]


# --- the map -----------------------------------------------------------------------------------


def _map(photos: tuple[Any, ...], look: Look) -> dict[str, Any] | None:
    """Return t-SNE's places (van der Maaten and Hinton 2008) of some photos of each label."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    parts = [p for p in photos if len(p.labels)]
    labels = np.concatenate([p.labels for p in parts])
    chosen = _evenly(labels, ON_MAP)
    if len(chosen) < 5:
        return None
    z = np.concatenate([p.z for p in parts])[chosen]
    paths = np.concatenate([p.paths for p in parts])[chosen]
    split = np.concatenate([np.full(len(p.labels), n) for n, p in enumerate(parts)])[chosen]
    with threadpool_limits(1):  # see pomona.model.classifier.one_thread_each
        places = TSNE(
            init="pca" if z.shape[1] >= 2 else "random",
            perplexity=min(30, (len(z) - 1) / 3),
            random_state=0,
        ).fit_transform(z)
    low, high = places.min(axis=0), places.max(axis=0)
    places = (places - low) / np.maximum(high - low, 1e-9)
    names, codes = np.unique(labels[chosen].astype(str), return_inverse=True)
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        thumbnails = list(pool.map(lambda path: look(str(path), THUMBNAIL), paths))
    return {
        "sprite": report_figures.sprite(thumbnails, len(chosen), THUMBNAIL, COLUMNS),
        "legend": [(str(name), _colour(n, len(names))) for n, name in enumerate(names)],
        "photos": sum(p.of for p in parts),
        "data": {
            "size": THUMBNAIL,
            "columns": COLUMNS,
            "names": names.tolist(),
            "colours": [_colour(n, len(names)) for n in range(len(names))],
            "points": [
                [round(float(x), 4), round(float(y), 4), int(code), int(s), str(path)]
                for (x, y), code, s, path in zip(places, codes, split, paths, strict=True)
            ],
        },
    }


def _evenly(labels: Any, most: int) -> Any:
    """Choose up to so many rows, of each label as many as there is room for."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order].astype(str), kind="stable")]
    _, starts, counts = np.unique(labels[order].astype(str), return_index=True, return_counts=True)
    turn = np.arange(len(order)) - np.repeat(starts, counts)
    return np.sort(order[np.argsort(turn, kind="stable")][:most])


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


# --- the model ---------------------------------------------------------------------------------


def _of_model(metrics: dict[str, Any], look: Look) -> dict[str, Any]:
    test, cross = metrics.get("test") or {}, metrics.get("cross_validation") or {}
    judged = {"Test": test, "cross-validation": cross}
    judged = {name: part for name, part in judged.items() if "accuracy" in part}
    leakage = metrics.get("leakage")
    return {
        "judged": judged,
        "reliability": report_figures.svg(report_figures.reliability(judged)) if judged else None,
        "mistakes": [
            {**row, "picture": report_figures.data_uri(look(row["path"], PICTURE))}
            for row in test.get("mistakes", [])
        ],
        "per_label": sorted(
            test.get("per_label", []), key=lambda r: 2 if r["f1"] is None else r["f1"]
        ),
        "labels_shown": LABELS_SHOWN,
        "confusion": _confusion(test, metrics["labels"]),
        "pairs": [
            {
                **pair,
                "pictures": [
                    report_figures.data_uri(look(pair[side], PICTURE)) for side in ("path", "like")
                ],
            }
            for pair in (leakage or {}).get("pairs", [])[:PAIRS_SHOWN]
        ],
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
