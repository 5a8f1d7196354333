from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pomona.backbone import weights
from pomona.backbone.extract import features_of
from pomona.core.errors import MismatchError, RequestError
from pomona.model import artifact, pca_table
from pomona.pipeline import run
from pomona.pipeline.extract import extract
from pomona.pipeline.reduce import ReduceOptions, reduce
from pomona.pipeline.train import TrainOptions, train
from pomona.spark.session import Cluster
from pomona.workspace import layout
from tests.conftest import fill, photo
from tests.pipeline.conftest import QUICK, TEN, varieties

pytest.importorskip("sklearn")


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "out")
    return tmp_path / "out"


def figures(out: Path) -> Any:
    return json.loads((out / "report" / "metrics.json").read_text())


def test_what_a_training_leaves(trained: Path) -> None:
    found = artifact.load_model(trained / "model")
    assert found.labels == ("Fruit 0", "Fruit 1", "Fruit 2")
    assert found.about["weights"] == {
        "name": "random:0",
        "digest": json.loads((trained / "features/_table.json").read_text())["spec"][
            "weights_digest"
        ],
        "trained": False,
    }
    told = figures(trained)
    assert told["cross_validation"]["by"] == "group"
    assert told["cross_validation"]["units"] == 15
    assert told["test"]["units"] == 6
    assert told["test"]["photos"] == 48
    assert [row["photos"] for row in told["test"]["per_label"]] == [16, 16, 16]
    assert [sum(row) for row in told["test"]["confusion"]] == [16, 16, 16]  # rows: true labels
    assert sorted(chain.from_iterable(told["unknown"]["rounds"])) == list(found.labels)
    assert told["leakage"]["looked_at"] == 48
    stages_told = json.loads((trained / "manifest.json").read_text())["stages"]
    assert stages_told["train"]["digests"] == found.about["digests"]
    assert not (trained / "_work").exists()


def tuned_on(out: Path, kinds: range) -> None:
    """Note in OUT that its weights were tuned on these kinds of each label."""
    place = out / "features" / "_table.json"
    table = json.loads(place.read_text())
    folders = [f"Training/Fruit {n}/Kind {n}-{kind}" for n in range(3) for kind in kinds]
    place.write_text(json.dumps({**table, "tuned_on": [weights.mark(f) for f in folders]}))


def centres(out: Path) -> Any:
    from safetensors.numpy import load_file

    tensors = load_file(out / "model" / "classifier.safetensors")
    return tensors.get("detector.centres", [])


def test_what_tuned_weights_saw_judges_nothing(out: Path) -> None:
    before = train(out)
    assert not figures(out)["cross_validation"]["weights_saw"]
    tuned_on(out, range(3))
    record = train(out)
    told = figures(out)["cross_validation"]
    assert record["made_from"] != before["made_from"]
    assert (told["units"], told["photos"], told["weights_saw"]) == (6, 48, False)
    assert told["not_judged"] == 0
    assert "weights_saw" not in record["metrics"]["cross_validation"]
    assert figures(out)["unknown"]["weights_saw"] and not figures(out)["test"]["weights_saw"]


@pytest.mark.parametrize("kinds", [5, 4])
def test_where_tuned_weights_saw_nearly_all_it_is_said(kinds: int, out: Path) -> None:
    """24 photos that they didn't see are too few to choose a model by."""
    from pomona.cli import render

    train(out, TrainOptions(unknown="distance"))
    tuned_on(out, range(kinds))
    assert len(centres(out)) == 15
    record = train(out, TrainOptions(unknown="distance"))
    assert len(centres(out)) == 3  # a label each: varieties are knots to such weights
    assert figures(out)["cross_validation"]["units"] == 15
    assert record["metrics"]["cross_validation"]["weights_saw"]
    table = render._figures(record["metrics"])
    assert "on which the weights were tuned" in str(table.columns[1].header)
    assert "too optimistic" in run.report(out).read_text()


def test_training_again_does_nothing_or_the_same(out: Path) -> None:
    before = {p.name: p.read_bytes() for p in (out / "model").iterdir()}
    first = train(out)
    assert {p.name: p.read_bytes() for p in (out / "model").iterdir()} == before
    shutil.rmtree(out / "model")
    again = train(out)
    assert again["digests"] == first["digests"]
    other = train(out, TrainOptions(class_weight="balanced"))
    assert other["made_from"] != first["made_from"]
    assert other["made_from"]["settings"]["class_weight"] == "balanced"


def test_stage_by_stage_and_the_file_agree(spark: Any, out: Path, tmp_path: Path) -> None:
    """Features, projection and classifier in NumPy; Spark's tables; predict; model.onnx."""
    from pomona.pipeline.predict import PredictOptions, predict

    found = artifact.load_model(out / "model")
    source = json.loads((out / "features/_table.json").read_text())["source"]
    table = pq.read_table(out / "features", columns=["path", "features"])
    features = dict(zip(table["path"].to_pylist(), features_of(table["features"]), strict=True))
    pca: dict[str, Any] = {}
    for name in ("training_pca", "test_pca"):
        rows = pca_table.read_photos(layout.open_out(out), name, 10**6)
        pca |= dict(zip(rows.paths, rows.z, strict=True))
    got: dict[str, dict[str, Any]] = {"here": {}, "spark": {}}
    for kind, options in (
        ("here", PredictOptions(device="cpu")),
        ("spark", PredictOptions(device="cpu", cluster=Cluster("local[2]"))),
    ):
        predict(
            [source],
            found,
            options,
            on_answers=lambda batch, kind=kind: got[kind].update(  # type: ignore[misc]
                {row["path"]: row for row in batch.to_pylist()}
            ),
        )
    head = found.head()
    for path, row in features.items():
        whole = head.apply(row[None])
        np.testing.assert_allclose(whole["pca_features"][0], pca[path], rtol=1e-4, atol=1e-4)
        here, spark_row = got["here"][f"{source}/{path}"], got["spark"][f"{source}/{path}"]
        order = np.argsort(-whole["probabilities"][0], kind="stable")[:3]
        assert here["nearest"] == spark_row["nearest"] == [found.labels[n] for n in order]
        for answer in (here, spark_row):
            np.testing.assert_allclose(
                answer["probabilities"], whole["probabilities"][0][order], atol=1e-4
            )


def test_labels_that_training_never_saw(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", labels=4, each=10)
    shutil.rmtree(source / "Training" / "Fruit 3")
    run.run(source, tmp_path / "o", QUICK, TEN, train_options=TrainOptions())
    told = figures(tmp_path / "o")["test"]
    assert told["photos"] == 30
    assert told["labels_never_seen"]["labels"] == ["Fruit 3"]
    assert told["labels_never_seen"]["photos"] == 10
    assert 0 <= told["labels_never_seen"]["called_unknown"] <= 1
    for label in range(3):
        shutil.rmtree(source / "Test" / f"Fruit {label}")
    run.run(source, tmp_path / "p", QUICK, TEN, train_options=TrainOptions())
    told = figures(tmp_path / "p")
    assert told["test"]["photos"] == 0
    assert told["leakage"] is None
    assert "test" not in artifact.load_model(tmp_path / "p/model").about["metrics"]


def test_a_label_with_one_photo_and_no_test(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", labels=3, each=10)
    shutil.rmtree(source / "Test")
    for n in range(1, 10):
        (source / "Training" / "Fruit 2" / f"{n}_100.jpg").unlink()
    run.run(source, tmp_path / "o", QUICK, TEN, train_options=TrainOptions())
    told = figures(tmp_path / "o")
    assert told["test"] is None
    assert told["cross_validation"]["not_judged"] == 1
    assert artifact.load_model(tmp_path / "o/model").labels == ("Fruit 0", "Fruit 1", "Fruit 2")


def test_two_photos_are_a_model_that_doubts_nothing(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", labels=2, each=1)
    run.run(
        source, tmp_path / "o", QUICK, ReduceOptions(1, plots=False), train_options=TrainOptions()
    )
    told = figures(tmp_path / "o")
    assert told["cross_validation"] is None
    assert told["test"]["kept"] == 1
    assert told["temperature"] == 1


def test_one_label(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", labels=1, each=12)
    records = run.run(source, tmp_path / "o", QUICK, TEN, train_options=TrainOptions())
    assert records["train"] == {"skipped": "all photos have the same label"}
    with pytest.raises(RequestError, match=r"needs photos of two labels, .* only one \(Fruit 0\)"):
        train(tmp_path / "o")


def test_numbers_that_are_not_finite(out: Path) -> None:
    path = next((out / "training_pca").rglob("*.parquet"))
    rows = pq.read_table(path, partitioning=None)
    values = rows["pca_features"].to_pylist()
    values[2][4] = float("nan")
    at = rows.schema.get_field_index("pca_features")
    column = pa.array(values, rows.schema.field(at).type)
    pq.write_table(rows.set_column(at, rows.schema.field(at), column), path)
    shutil.rmtree(out / "model")
    with pytest.raises(RequestError, match=r"not finite for 1 photos \(first: Training/"):
        train(out)


def test_more_rows_than_wanted(out: Path) -> None:
    record = train(out, TrainOptions(max_rows=60))
    told = figures(out)
    assert told["photos_in_table"] == 120
    assert told["photos"] == record["photos"] == 60
    rows = pca_table.read_photos(layout.open_out(out), "training_pca", 60)
    assert {label: int((rows.labels == label).sum()) for label in set(rows.labels)} == {
        f"Fruit {n}": 20 for n in range(3)
    }


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (TrainOptions(class_weight="heavy"), "--class-weight is none or balanced"),
        (TrainOptions(max_rows=1), "--max-rows is at least 2"),
        (TrainOptions(unknown="magic"), "--unknown is auto or one of max_probability"),
        (TrainOptions(keep=1.0), "--keep is a share between 0 and 1"),
    ],
)
def test_options_that_cant_be(tmp_path: Path, options: TrainOptions, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        train(tmp_path, options)


@pytest.mark.parametrize("method", ["max_probability", "energy", "distance", "neighbours"])
def test_a_method_can_be_asked_for(out: Path, method: str) -> None:
    assert train(out, TrainOptions(unknown=method))["unknown"]["method"] == method
    told = figures(out)
    assert told["unknown"]["method"] == method
    assert told["test"]["kept"] <= 1


def test_stages_in_the_wrong_order(out: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no"):
        train(tmp_path / "nowhere")
    extract(fill(tmp_path / "source"), tmp_path / "o", QUICK)
    with pytest.raises(RequestError, match=r"no PCA features .* pomona reduce makes them"):
        train(tmp_path / "o")
    reduce(tmp_path / "o", TEN)
    (tmp_path / "source/Training/Fruit 0/new.jpg").write_bytes(photo(77))
    extract(tmp_path / "source", tmp_path / "o", QUICK)
    with pytest.raises(RequestError, match="older than the features: run pomona reduce again"):
        train(tmp_path / "o")


def test_a_backbone_that_isnt_the_features(out: Path) -> None:
    shutil.rmtree(out / "model")
    path = out / "features" / "_backbone.onnx"
    whole = path.read_bytes()
    path.write_bytes(b"no ONNX")
    with pytest.raises(MismatchError, match="damaged"):
        train(out)
    path.unlink()
    with pytest.raises(MismatchError, match="run the same pomona extract again"):
        train(out)
    path.write_bytes(whole)
    assert train(out)["labels"] == 3


def test_near_copies_are_found(tmp_path: Path) -> None:
    source = varieties(tmp_path / "source", each=6)
    for n in range(4):
        one = source / "Training" / "Fruit 1" / "Kind 1-0" / f"{n}.jpg"
        shutil.copy(one, source / "Test" / "Fruit 1" / "Kind 1-5" / f"copy {n}.jpg")
    options = replace(QUICK, label="top")
    run.run(source, tmp_path / "o", options, TEN, train_options=TrainOptions())
    told = figures(tmp_path / "o")["leakage"]
    pairs = {pair["path"]: pair["like"] for pair in told["pairs"] if pair["cosine"] >= 0.9999}
    assert pairs == {
        f"Test/Fruit 1/Kind 1-5/copy {n}.jpg": f"Training/Fruit 1/Kind 1-0/{n}.jpg"
        for n in range(4)
    }
    assert told["near_copies"] >= 4
    assert told["accuracy_with"] == pytest.approx(
        figures(tmp_path / "o")["test"]["accuracy"]["value"]
    )


def test_an_active_session_isnt_needed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training runs on the driver alone."""
    from pomona.spark import session

    def no(cluster: Cluster) -> Any:
        raise AssertionError("Spark was started")

    monkeypatch.setattr(session, "session", no)
    shutil.rmtree(out / "model")
    assert train(out)["labels"] == 3
