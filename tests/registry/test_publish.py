"""``pomona publish``: versions, aliases, and what can't be published."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pomona.core.errors import MismatchError, MissingError, RequestError
from pomona.model import artifact, pca_table
from pomona.model.head import Head
from pomona.pipeline.run import track
from pomona.registry import publish, tracking
from pomona.registry.publish import PublishOptions
from pomona.workspace import layout
from tests.registry.conftest import free_port, perfect, put, store, wrong

mlflow = pytest.importorskip("mlflow")
pytest.importorskip("sklearn")

# MLflow and SQLAlchemy warn of each other's deprecations when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def client(out: Path) -> Any:
    return mlflow.MlflowClient(store(out))


def test_the_first_version_is_champion(out: Path, client: Any, capfd: Any) -> None:
    before = dict(os.environ)
    record = publish.publish(out)
    assert dict(os.environ) == before
    assert capfd.readouterr() == ("", "")
    assert {k: record[k] for k in ("name", "version", "registered", "aliases", "comparison")} == {
        "name": "pomona",
        "version": "1",
        "registered": True,
        "aliases": ["challenger", "champion"],
        "comparison": None,
    }
    assert record["why"] == "champion: there was none"
    version = client.get_model_version("pomona", "1")
    assert version.run_id == record["run"]
    assert version.tags["model_digest"] == artifact.load_model(out / "model").about["digest"]
    run = client.get_run(record["run"])
    assert "test_accuracy" in run.data.metrics
    assert [o.model_id for o in run.outputs.model_outputs] == [version.source.split("/")[-1]]
    assert not [path for path in out.rglob("*") if path.suffix in (".pkl", ".pickle")]


def test_the_same_model_twice(out: Path, client: Any) -> None:
    publish.publish(out)
    again = publish.publish(out)
    assert not again["registered"]
    assert (again["version"], again["aliases"]) == ("1", [])
    assert again["why"] == "this model is version 1 already, the champion"
    assert len(client.search_model_versions("name='pomona'")) == 1


def test_the_version_belongs_to_the_recorded_run(out: Path) -> None:
    track(out, json.loads((out / "manifest.json").read_text())["stages"])
    about = json.loads((out / "manifest.json").read_text())["stages"]["track"]
    assert publish.publish(out)["run"] == about["run"]
    put(out, wrong(out))
    assert publish.publish(out)["run"] != about["run"]


def test_a_worse_model_isnt_promoted(out: Path, client: Any) -> None:
    put(out, perfect(out))
    publish.publish(out)
    put(out, wrong(out))
    record = publish.publish(out)
    assert record["version"] == "2"
    assert record["aliases"] == ["challenger"]
    assert record["why"] == (
        "not promoted: right on 0.00% of 24 Test photos, version 1 on 100.00% (p = 1)"
    )
    assert client.get_registered_model("pomona").aliases == {"challenger": 2, "champion": 1}
    assert client.get_model_version("pomona", "2").tags["why"] == record["why"]
    # Again: it keeps its version; with a reason it is promoted all the same.
    record = publish.publish(out, PublishOptions(promote="the old labels are gone"))
    assert not record["registered"]
    assert (record["version"], record["aliases"]) == ("2", ["challenger", "champion"])
    assert record["why"].startswith(
        "champion by --promote (the old labels are gone); on its own not"
    )
    tags = client.get_model_version("pomona", "2").tags
    assert tags["promotion_reason"] == "the old labels are gone"
    assert (tags["accuracy"], tags["accuracy_champion"], tags["photos"]) == ("0.0", "1.0", "24")
    assert client.get_registered_model("pomona").aliases["champion"] == 2


def test_a_better_model_is_promoted(out: Path) -> None:
    put(out, wrong(out))
    publish.publish(out)
    put(out, perfect(out))
    record = publish.publish(out)
    assert record["aliases"] == ["challenger", "champion"]
    figures = record["comparison"]
    assert (figures["only_new_right"], figures["only_champion_right"]) == (24, 0)
    assert figures["p_value"] < 0.001
    assert "champion: right on 100.00%" in record["why"]


def test_a_little_better_may_be_chance(out: Path) -> None:
    best = perfect(out)
    put(out, replace(best, classifier=one_wrong(out, best)))
    publish.publish(out)
    put(out, best)
    record = publish.publish(out)
    assert record["aliases"] == ["challenger"]
    assert record["comparison"]["only_new_right"] == 1
    assert record["why"].endswith("which may be chance (p < 0.05 is asked for)")


def one_wrong(out: Path, best: Head) -> Any:
    """Lower one label's bias until the first photo is missed."""
    photos = pca_table.read_photos(layout.open_out(out), "test_pca", 10**6)
    y = np.array([best.classifier.labels.index(label) for label in photos.labels])
    logits = best.classifier.logits(photos.z)
    own = logits[np.arange(len(y)), y]
    rest = np.where(np.eye(logits.shape[1], dtype=bool)[y], -np.inf, logits).max(axis=1)
    margins = np.sort((own - rest)[y == 0])
    bias = best.classifier.bias.copy()
    bias[0] -= best.classifier.temperature * (margins[0] + margins[1]) / 2
    return replace(best.classifier, bias=bias)


def test_half_a_registration_is_taken_back(
    out: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(*_: Any, **__: Any) -> Any:
        raise mlflow.MlflowException("the registry is read-only")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "set_registered_model_alias", no)
        with pytest.raises(RequestError, match=r"sqlite.* failed \(the registry is read-only\)"):
            publish.publish(out)
    assert client.search_registered_models() == []
    experiment = client.get_experiment_by_name("pomona").experiment_id
    assert client.search_runs([experiment]) == []
    assert client.search_logged_models([experiment]) == []
    assert publish.publish(out)["aliases"] == ["challenger", "champion"]


def test_what_cant_be_published(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="--promote takes a reason"):
        publish.publish(out, PublishOptions(promote=" "))
    with pytest.raises(RequestError, match="--name is a word without"):
        publish.publish(out, PublishOptions("a/b"))
    (out / "model" / "classifier.safetensors").write_bytes(b"other")
    with pytest.raises(MismatchError, match="was changed or damaged"):
        publish.publish(out)
    shutil.rmtree(out / "model")
    with pytest.raises(RequestError, match="pomona train --out OUT makes one"):
        publish.publish(out)


def test_mlflow_is_missing_or_silent(
    out: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:secret@127.0.0.1:{free_port()}")
    for action in (lambda: publish.publish(out), lambda: publish.fetch("models:/pomona/1")):
        naps.clear()
        with pytest.raises(RequestError, match="and does it answer") as error:
            action()
        assert "secret" not in str(error.value)
        assert sum(naps) < 10
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="pip install 'pomona"):
        publish.publish(out)
