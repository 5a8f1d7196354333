"""``models:/NAME@ALIAS`` becomes a folder in the cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pomona.core.errors import MismatchError, RequestError
from pomona.model import artifact
from pomona.registry import publish
from tests.keys import make_keys
from tests.registry.conftest import flipped, put, store

pytest.importorskip("mlflow")
pytest.importorskip("sklearn")

# MLflow and SQLAlchemy warn of each other's deprecations when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_fetching_by_alias_and_version(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish.publish(out)
    wanted = artifact.load_model(out / "model")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store(out))
    first = publish.fetch("models:/pomona@champion")
    assert artifact.load_model(first).about == wanted.about
    assert publish.fetch("models:/pomona/1") == publish.fetch("models:/pomona@challenger")
    assert publish.fetch("models:/pomona/latest") == first
    run = json.loads((out / "manifest.json").read_text())["stages"]["track"]["run"]
    assert publish.fetch(f"runs:/{run}/model") == first
    shutil.rmtree(out / "mlflow-artifacts")  # the cache holds it
    assert publish.fetch("models:/pomona@champion") == first
    (first / "model.onnx").write_bytes(b"other")  # and mends itself, where the store can
    with pytest.raises(RequestError):
        publish.fetch("models:/pomona@champion")


@pytest.mark.parametrize("name", ["model.json", "model.onnx", "classifier.safetensors"])
def test_an_emptied_file_in_the_cache_is_fetched_again(
    out: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    publish.publish(out)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store(out))
    first = publish.fetch("models:/pomona@champion")
    (first / name).write_bytes(b"")
    assert publish.fetch("models:/pomona@champion") == first
    assert (first / name).read_bytes() == (out / "model" / name).read_bytes()


def test_a_signature_comes_with_the_version(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = make_keys(tmp_path, "mine"), make_keys(tmp_path, "theirs")
    assert publish.publish(out)["signed"] is False
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store(out))
    uri = "models:/pomona@champion"
    unsigned = publish.fetch(uri)
    with pytest.raises(MismatchError, match="isn't signed"):
        artifact.load_model(publish.fetch(uri, mine.public), verify=mine.public)
    # The version is there, and in the cache: the signature is added, and fetched.
    again = publish.publish(out, publish.PublishOptions(sign=mine.private))
    assert (again["registered"], again["signed"], again["version"]) == (False, True, "1")
    signed = publish.fetch(uri, mine.public)
    assert signed == unsigned
    assert artifact.load_model(signed, verify=mine.public).version
    with pytest.raises(MismatchError, match="is no signature by"):
        artifact.load_model(publish.fetch(uri, theirs.public), verify=theirs.public)
    # Another model is signed before it is registered.
    put(out, flipped(out))
    new = publish.publish(out, publish.PublishOptions(sign=theirs.private, promote="a test"))
    assert (new["registered"], new["signed"]) == (True, True)
    assert artifact.load_model(publish.fetch(uri, theirs.public), verify=theirs.public)
    with pytest.raises(RequestError, match="private EC key"):
        publish.publish(out, publish.PublishOptions(sign=theirs.public))


def test_what_cant_be_fetched(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="set MLFLOW_TRACKING_URI"):
        publish.fetch("models:/pomona@champion")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'no.db'}")
    with pytest.raises(RequestError, match="there is no such file"):
        publish.fetch("models:/pomona@champion")
    assert not (tmp_path / "no.db").exists()
    registry_uri = store(out)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry_uri)
    rule = r"there is no models:/\S+ in MLflow: pomona publish"
    with pytest.raises(RequestError, match=rule):
        publish.fetch("models:/pomona@champion")
    publish.publish(out)
    for uri in ("models:/pomona@best", "models:/pomona/7", "models:/pear@champion"):
        with pytest.raises(RequestError, match=rule):
            publish.fetch(uri)
    run = json.loads((out / "manifest.json").read_text())["stages"]["track"]["run"]
    with pytest.raises(RequestError, match="holds no model of Pomona's"):
        publish.fetch(f"runs:/{run}/manifest.json")


def test_a_model_that_was_changed_in_the_store(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish.publish(out)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store(out))
    place = next((out / "mlflow-artifacts" / "models").glob("*/artifacts/data/model"))
    shutil.rmtree(place)
    put(out, flipped(out))
    shutil.copytree(out / "model", place)  # whole, but another one
    with pytest.raises(MismatchError, match="isn't the model that was registered"):
        publish.fetch("models:/pomona@champion")
    (place / "model.onnx").write_bytes(b"other")
    with pytest.raises(MismatchError, match="was changed or damaged"):
        publish.fetch("models:/pomona@champion")
