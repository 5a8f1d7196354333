"""How often the answers are right: recipes under cross-validation, then the chosen one on Test.

    python benchmarks/accuracy.py --out OUT --not-fruit FOLDER

OUT comes from ``pomona run SOURCE --out OUT --label top``. Recipes are compared by
cross-validation over whole groups of Training; Test is looked at for the plain recipe and for the
one that was chosen. Then every label is a folder of its own and a random quarter of Training is
held out; then the scores for "unknown" are compared, also on photos of something else.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from pomona.backbone import extract
from pomona.backbone.extract import features_of
from pomona.model import artifact, classifier, metrics, sampling, unknown
from pomona.model import projection as proj
from pomona.model.sampling import Codes
from pomona.photos import decoding, source
from pomona.workspace import layout

Rows = npt.NDArray[np.float32]


class Recipe(NamedTuple):
    """What comes after the backbone."""

    name: str
    power: float = 1.0
    components: int = 50
    strengths: tuple[float, ...] = classifier.STRENGTHS
    class_weight: str = "none"
    whiten: bool = False


PLAIN = Recipe("plain: standardised, 50 components, C = 1", strengths=(1.0,))
RECIPES = (
    PLAIN,
    Recipe("C chosen"),
    Recipe("power 0.5, C = 1", 0.5, strengths=(1.0,)),
    Recipe("power 0.5, C chosen", 0.5),
    Recipe("power 0.5, C chosen, weights balanced", 0.5, class_weight="balanced"),
    Recipe("power 0.5, 30 components, C chosen", 0.5, 30),
    Recipe("power 0.5, 100 components, C chosen", 0.5, 100),
    Recipe("power 0.5, 200 components, C chosen", 0.5, 200),
    Recipe("power 0.5, whitened, C chosen", 0.5, whiten=True),
)
DEFAULT = RECIPES[3]


class Photos(NamedTuple):
    """Features with labels and groups."""

    x: Rows
    labels: list[str]
    groups: list[str]


def read(out: Path, split: str) -> Photos:
    table = pq.read_table(
        out / "features" / f"split={split}", columns=["path", "label", "features"]
    )
    table = table.filter(table["features"].is_valid())
    groups = [source.folder_of(path) for path in table["path"].to_pylist()]
    return Photos(features_of(table["features"]), table["label"].to_pylist(), groups)


def fit_projection(recipe: Recipe, x: Rows) -> proj.Projection:
    moments = proj.Moments.of(proj.raised(x, recipe.power))
    return proj.fit(moments, recipe.components, power=recipe.power, whiten=recipe.whiten)


def judge(recipe: Recipe, x: Rows, y: Codes, groups: Codes | None, names: tuple[str, ...]) -> Any:
    """Return the best trial."""
    z = fit_projection(recipe, x).transform(x)
    sample, splits = sampling.Sample(z, y, names, groups), sampling.folds(y, groups)
    trials = [classifier.trial(sample, splits, s, recipe.class_weight) for s in recipe.strengths]
    return max(trials, key=lambda trial: trial.accuracy)


def final(recipe: Recipe, strength: float, train: Photos, test: Photos) -> float:
    names, y = classifier.encode(train.labels)
    projection = fit_projection(recipe, train.x)
    fitted = classifier.fit(projection.transform(train.x), y, names, strength, recipe.class_weight)
    guess = fitted.logits(projection.transform(test.x)).argmax(axis=1)
    return float(np.mean([names[g] == label for g, label in zip(guess, test.labels, strict=True)]))


def unseen_varieties(train: Photos, test: Photos) -> None:
    names, y = classifier.encode(train.labels)
    groups = classifier.encode(train.groups)[1]
    print(f"\n{len(y):,} Training photos, {len(test.labels):,} Test photos, by {len(names)} labels")
    found = {}
    for recipe in RECIPES:
        best = found[recipe] = judge(recipe, train.x, y, groups, names)
        print(f"  {recipe.name:42} cross-validation {best.accuracy:7.2%}  C = {best.strength:g}")
    ours = {
        recipe: final(recipe, found[recipe].strength, train, test) for recipe in (PLAIN, DEFAULT)
    }
    print(
        f"  Test, plain recipe: {ours[PLAIN]:.2%}; default of pomona run: {ours[DEFAULT]:.2%}, "
        f"{100 * (ours[DEFAULT] - ours[PLAIN]):+.2f} points"
    )


def seen_varieties(train: Photos) -> dict[Recipe, tuple[float, float]]:
    """Return accuracy on a random quarter of Training, every variety a label, and C by recipe."""
    names, y = classifier.encode(train.groups)
    held = np.random.default_rng(0).permutation(len(y)) < len(y) // 4
    parts = [
        Photos(train.x[m], [train.groups[n] for n in np.flatnonzero(m)], []) for m in (~held, held)
    ]
    found = {}
    for recipe in (PLAIN, DEFAULT):
        best = judge(recipe, parts[0].x, y[~held], None, names)
        found[recipe] = (final(recipe, best.strength, *parts), best.strength)
    return found


def strangers(out: Path, folder: Path) -> Rows:
    """Features of the photos in a folder, by the network of OUT."""
    found = artifact.load_model(out / "model")
    spec = found.spec(("features",))
    photos = [
        decoding.decode(path.read_bytes(), spec.image_size) for path in sorted(folder.iterdir())
    ]
    return np.concatenate(
        [extract.load_network(spec)(p.pixels[None])[0] for p in photos if p.pixels is not None]
    )


def scores(train: Photos, test: Photos, away: Rows) -> Iterator[str]:
    for what, labels in (("labels", train.labels), ("varieties", train.groups)):
        names, y = classifier.encode(labels)
        groups = classifier.encode(train.groups)[1] if what == "labels" else None
        best = judge(DEFAULT, train.x, y, groups, names)
        projection = fit_projection(DEFAULT, train.x)
        z, zt, za = (projection.transform(x) for x in (train.x, test.x, away))
        splits = sampling.folds(y, groups)
        t = classifier.temperature(best.logits, y[best.rows])
        settings = classifier.Settings("none", best.strength, t)
        sample = sampling.Sample(z, y, names, groups)
        compared = unknown.compare(sample, settings, lambda: None)
        fitted = replace(classifier.fit(z, y, names, best.strength), temperature=t)
        for method in unknown.METHODS:
            held = unknown.held_out(method, sample, splits, settings)
            limit = unknown.threshold(held, 0.95)
            detector = unknown.make(method, z, sample.kinds)
            other = detector.score(za, fitted.logits(za))
            here = detector.score(zt, fitted.logits(zt))
            yield (
                f"  {len(names):3} {what:10} {method:16} {compared['auroc'][method]:7.3f} "
                f"{metrics.auroc(held, other):9.3f} {(other < limit).mean():9.0%} "
                f"{(here < limit).mean():9.1%}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--not-fruit", type=Path, help="a folder of photos of something else")
    options = parser.parse_args()
    with classifier.one_thread_each():
        compare(options)


def compare(options: argparse.Namespace) -> None:
    layout.open_out(options.out, must_exist=True)
    train, test = read(options.out, "Training"), read(options.out, "Test")
    unseen_varieties(train, test)
    print(f"\na random quarter of Training held out, {len(set(train.groups))} labels")
    for recipe, (right, strength) in seen_varieties(train).items():
        print(f"  {recipe.name:42} {right:7.2%}  C = {strength:g}")
    if options.not_fruit:
        print(
            "\nunknown, keeping 95 % of held-out known photos: AUROC on labels left out, AUROC and"
        )
        print("share refused of photos of something else, share of Test called unknown")
        for line in scores(train, test, strangers(options.out, options.not_fruit)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
