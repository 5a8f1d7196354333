"""Two models on the same Test photos: which one names them right more often."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pomona.backbone.extract import features_of
from pomona.core.errors import RequestError, SourceError
from pomona.core.files import read_json
from pomona.core.parquet import sliced
from pomona.core.progress import OnTick, Tick, quiet
from pomona.model import metrics, pca_table
from pomona.model.artifact import Model
from pomona.model.recogniser import for_driver, make_recogniser, recognise
from pomona.photos.reading import read
from pomona.photos.source import open_readable
from pomona.workspace.layout import Out

Strings = npt.NDArray[np.object_]


def compare(out: Out, new: Model, champion: Model, on_tick: OnTick = quiet) -> dict[str, Any]:
    """Compare the most probable labels of two models on the Test photos of OUT.

    Photos whose label neither model knows are left out; a label that one of them doesn't know is
    wrong for that one. Whether a model would call a photo unknown doesn't matter here.

    Units are groups where OUT's labels are by ``top``, else photos; the p-value is that of
    `pomona.model.metrics.paired_test`. RequestError if there are no such photos, or a model needs
    their files and they can't be read.
    """
    photos = pca_table.read_photos(out, "test_pca", pca_table.MAX_ROWS)
    known = {*new.labels, *champion.labels}
    photos = photos.take(np.array([label in known for label in photos.labels], bool))
    if not len(photos.labels):
        raise RequestError("there are no Test photos with a label that one of the models knows")
    by_group = read_json(out.table_file)["label"] == "top"
    units = pca_table.groups_of(photos) if by_group else np.arange(len(photos.labels))
    new_right, old_right = (
        _guesses(out, model, photos.paths, on_tick) == photos.labels for model in (new, champion)
    )
    return {
        "photos": len(new_right),
        "by": "group" if by_group else "photo",
        "units": len(np.unique(units)),
        "accuracy": float(new_right.mean()),
        "accuracy_champion": float(old_right.mean()),
        "only_new_right": int((new_right & ~old_right).sum()),
        "only_champion_right": int((old_right & ~new_right).sum()),
        "p_value": metrics.paired_test(new_right, old_right, units),
    }


def _guesses(out: Out, model: Model, paths: Strings, on_tick: OnTick) -> Strings:
    """Return a model's most probable label for each photo, from features where they fit it."""
    table = read_json(out.table_file)
    spec = table["spec"]
    same_weights = model.about["weights"]["digest"] == spec["weights_digest"]
    if same_weights and model.about["preprocessing"] == spec["preprocessing"]:
        guesses = dict(_from_features(out, model, on_tick))
    else:
        guesses = dict(_from_photos(table["source"], model, paths, on_tick))
    if missing := [path for path in paths if path not in guesses]:
        raise RequestError(
            f"{len(missing):,} Test photos have no features any more (first: {missing[0]}): run "
            "pomona reduce and train again"
        )
    return np.array([guesses[path] for path in paths], object)


def _from_features(out: Out, model: Model, on_tick: OnTick) -> Iterator[tuple[str, str]]:
    """Apply what comes after the backbone to ``OUT/features``, a row group at a time."""
    head, done = model.head(), 0
    files = read_json(out.table_file)["files"]
    names = sorted(name for name in files if name.startswith("split=Test/"))
    total = sum(files[name]["rows"] for name in names)
    for name in names:
        with pq.ParquetFile(out.features / name) as file:
            for batch in file.iter_batches(columns=["path", "features"]):
                rows = batch.filter(pc.is_valid(batch["features"]))
                probabilities = head.apply(features_of(rows["features"]))["probabilities"]
                guesses = [model.labels[n] for n in probabilities.argmax(axis=1)]
                yield from zip(rows["path"].to_pylist(), guesses, strict=True)
                done += batch.num_rows
                on_tick(Tick("publish", done, total))


def _from_photos(
    source_name: str, model: Model, paths: Strings, on_tick: OnTick
) -> Iterator[tuple[str, str]]:
    """Run a model on the photos themselves: its weights or image size aren't those of OUT."""
    try:
        source = open_readable(source_name)
    except SourceError as error:
        raise SourceError(f"it needs the photos, and {error}") from error
    recogniser = for_driver(make_recogniser(model, 1))
    photos = pa.record_batch({"path": pa.array(paths, pa.string())})
    batches = sliced([photos], recogniser.spec.batch_size)  # before reading: it bounds the bytes
    done = 0
    for batch in recognise(read(batches, source), recogniser):
        for row in batch.to_pylist():
            if row["error"]:
                raise SourceError(
                    f"it needs the photos, and {row['path']} in {source.name} is {row['error']} now"
                )
            yield row["path"], row["nearest"][0]
        done += batch.num_rows
        on_tick(Tick("publish", done, len(paths)))
