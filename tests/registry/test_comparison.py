"""The comparison of a challenger with the champion on the same Test photos."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pomona.backbone import weights
from pomona.backbone.spec import make_spec
from pomona.core.errors import SourceError
from pomona.core.files import read_json, write_json
from pomona.model import artifact, comparison
from pomona.registry import publish
from pomona.workspace import layout
from tests.registry.conftest import answer, flipped, perfect, put

pytest.importorskip("mlflow")
pytest.importorskip("sklearn")

# MLflow and SQLAlchemy warn of each other's deprecations when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_a_champion_of_another_image_size_sees_the_photos(out: Path) -> None:
    folder = layout.open_out(out)
    new = put(out, perfect(out))
    shape = {**new.about["preprocessing"], "image_size": 64}
    spec = make_spec(weights.load_weights("fruits"), image_size=64, device="cpu")
    artifact.save_model(
        out / "other", spec.payload, new.head(), {**bare(new.about), "preprocessing": shape}
    )
    other = artifact.load_model(out / "other")
    ticks: list[Any] = []
    figures = comparison.compare(folder, new, other, ticks.append)
    assert figures["accuracy"] == 1
    assert [(t.done, t.total) for t in ticks if t.total][-1] == (24, 24)
    table = read_json(folder.table_file)
    path = Path(table["source"], "Test", "Fruit 1", "3_100.jpg")
    by_hand = answer(other, path.read_bytes())
    paths = np.array(["Test/Fruit 1/3_100.jpg"], object)
    guesses = dict(comparison._from_photos(table["source"], other, paths, lambda _: None))
    assert guesses == {paths[0]: by_hand["nearest"][0]}


def bare(about: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in about.items() if name not in ("digest", "digests")}


def test_photos_that_are_gone(out: Path, tmp_path: Path) -> None:
    folder = layout.open_out(out)
    model = artifact.load_model(out / "model")
    shutil.copytree(out / "model", out / "other")
    others = {**model.about["weights"], "digest": "of others"}
    artifact.write_about(out / "other", {**bare(model.about), "weights": others})
    table = read_json(folder.table_file)
    source = shutil.copytree(table["source"], tmp_path / "photos")
    (source / "Test" / "Fruit 0" / "0_100.jpg").unlink()
    write_json(folder.table_file, {**table, "source": str(source)})
    with pytest.raises(SourceError, match=r"Test/Fruit 0/0_100\.jpg in .* is unreadable now"):
        comparison.compare(folder, model, artifact.load_model(out / "other"))
    # The version is registered all the same.
    shutil.copytree(out / "model", tmp_path / "mine")
    shutil.rmtree(out / "model")
    shutil.copytree(out / "other", out / "model")
    publish.publish(out)
    shutil.rmtree(out / "model")
    shutil.copytree(tmp_path / "mine", out / "model")
    record = publish.publish(out)
    assert (record["version"], record["aliases"]) == ("2", ["challenger"])
    assert record["why"].startswith(
        "not promoted: no comparison with version 1: it needs the photos"
    )


def test_labels_that_a_model_doesnt_know_are_wrong(out: Path) -> None:
    best = perfect(out)
    names = ("Fruit 0", "Fruit 1", "Pear")
    other = put(out, replace(best, classifier=replace(best.classifier, labels=names)))
    new = put(out, best)
    figures = comparison.compare(layout.open_out(out), new, other)
    assert figures["photos"] == 24
    assert figures["accuracy_champion"] == pytest.approx(2 / 3)
    figures = comparison.compare(layout.open_out(out), other, other)
    assert (figures["photos"], figures["accuracy"]) == (16, 1)


def test_groups_are_the_units_where_labels_are_by_top(out: Path) -> None:
    model = artifact.load_model(out / "model")
    folder = layout.open_out(out)
    write_json(folder.table_file, {**read_json(folder.table_file), "label": "top"})
    figures = comparison.compare(folder, model, model)
    assert (figures["by"], figures["units"], figures["p_value"]) == ("group", 3, 1)


def test_no_test_photos(out: Path) -> None:
    publish.publish(out)
    shutil.rmtree(out / "test_pca")
    put(out, flipped(out))
    record = publish.publish(out)
    assert record["aliases"] == ["challenger"]
    assert "there are no Test photos" in record["why"]


def test_a_champion_whose_files_are_gone(out: Path) -> None:
    publish.publish(out)
    shutil.rmtree(next((out / "mlflow-artifacts" / "models").iterdir()) / "artifacts")
    put(out, flipped(out))
    record = publish.publish(out)
    assert record["aliases"] == ["challenger"]
    assert "no comparison with version 1" in record["why"]
