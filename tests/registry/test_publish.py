from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pomona.backbone import weights
from pomona.backbone.spec import make_spec
from pomona.core.errors import MismatchError, MissingError, RequestError, SourceError
from pomona.core.files import read_json, write_json
from pomona.model import artifact, classifier, comparison, pca_table
from pomona.model.head import Head
from pomona.model.recogniser import make_recogniser, recognise
from pomona.pipeline.extract import ExtractOptions
from pomona.pipeline.reduce import ReduceOptions
from pomona.pipeline.run import run, track
from pomona.pipeline.train import TrainOptions
from pomona.registry import publish, pyfunc, tracking
from pomona.registry.publish import PublishOptions
from pomona.workspace import layout
from tests.conftest import fill, photo

mlflow = pytest.importorskip("mlflow")
pytest.importorskip("sklearn")

# MLflow and SQLAlchemy warn of each other's deprecations when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUICK = ExtractOptions(weights="fruits", image_size=32, device="cpu")


@pytest.fixture(scope="module")
def trained(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT with a model, and an empty registry: a database takes MLflow seconds to make."""
    base = tmp_path_factory.mktemp("trained")
    source = fill(base / "source")
    run(source, base / "out", QUICK, ReduceOptions(20, plots=False), train_options=TrainOptions())
    with tracking.connected(f"sqlite:///{base / 'out' / 'mlflow.db'}") as client:
        client.search_registered_models()
    return base / "out"


@pytest.fixture
def out(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    monkeypatch.setenv("POMONA_CACHE", str(tmp_path / "cache"))
    shutil.copytree(trained, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def client(out: Path) -> Any:
    return mlflow.MlflowClient(store(out))


def store(out: Path) -> str:
    return f"sqlite:///{out}/mlflow.db"


def put(out: Path, top: Head, **about: Any) -> artifact.Model:
    """Replace OUT's model."""
    old = artifact.load_model(out / "model").about
    backbone = (out / "features" / "_backbone.onnx").read_bytes()
    artifact.save_model(out / "model", backbone, top, {**old, **about})
    return artifact.load_model(out / "model")


def perfect(out: Path) -> Head:
    """A head that has learned Test by heart."""
    photos = pca_table.read_photos(layout.open_out(out), "test_pca", 10**6)
    labels, y = classifier.encode(photos.labels.tolist())
    head = artifact.load_model(out / "model").head()
    fitted = classifier.fit(photos.z, y, labels, 1.0)
    assert (fitted.logits(photos.z).argmax(axis=1) == y).all()
    return replace(head, classifier=fitted)


def wrong(out: Path) -> Head:
    """A head that is never right on Test."""
    best = perfect(out)
    turned = replace(best.classifier, weight=-best.classifier.weight, bias=-best.classifier.bias)
    return replace(best, classifier=turned)


# --- versions and aliases ----------------------------------------------------------------------


def test_the_first_version_is_champion(out: Path, client: Any, capfd: Any) -> None:
    before = dict(os.environ)
    told = publish.publish(out)
    assert dict(os.environ) == before
    assert capfd.readouterr() == ("", "")
    assert {k: told[k] for k in ("name", "version", "registered", "aliases", "comparison")} == {
        "name": "pomona",
        "version": "1",
        "registered": True,
        "aliases": ["challenger", "champion"],
        "comparison": None,
    }
    assert told["why"] == "champion: there was none"
    version = client.get_model_version("pomona", "1")
    assert version.run_id == told["run"]
    assert version.tags["model_digest"] == artifact.load_model(out / "model").about["digest"]
    run = client.get_run(told["run"])
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
    told = publish.publish(out)
    assert told["version"] == "2"
    assert told["aliases"] == ["challenger"]
    assert told["why"] == (
        "not promoted: right on 0.00% of 24 Test photos, version 1 on 100.00% (p = 1)"
    )
    assert client.get_registered_model("pomona").aliases == {"challenger": 2, "champion": 1}
    assert client.get_model_version("pomona", "2").tags["why"] == told["why"]
    # Again: it keeps its version; with a reason it is promoted all the same.
    told = publish.publish(out, PublishOptions(promote="the old labels are gone"))
    assert not told["registered"]
    assert (told["version"], told["aliases"]) == ("2", ["challenger", "champion"])
    assert told["why"].startswith("champion by --promote (the old labels are gone); on its own not")
    tags = client.get_model_version("pomona", "2").tags
    assert tags["promotion_reason"] == "the old labels are gone"
    assert (tags["accuracy"], tags["accuracy_champion"], tags["photos"]) == ("0.0", "1.0", "24")
    assert client.get_registered_model("pomona").aliases["champion"] == 2


def test_a_better_model_is_promoted(out: Path) -> None:
    put(out, wrong(out))
    publish.publish(out)
    put(out, perfect(out))
    told = publish.publish(out)
    assert told["aliases"] == ["challenger", "champion"]
    figures = told["comparison"]
    assert (figures["only_new_right"], figures["only_champion_right"]) == (24, 0)
    assert figures["p_value"] < 0.001
    assert "champion: right on 100.00%" in told["why"]


def test_a_little_better_may_be_chance(out: Path) -> None:
    best = perfect(out)
    put(out, replace(best, classifier=one_wrong(out, best)))
    publish.publish(out)
    put(out, best)
    told = publish.publish(out)
    assert told["aliases"] == ["challenger"]
    assert told["comparison"]["only_new_right"] == 1
    assert told["why"].endswith("which may be chance (p < 0.05 is asked for)")


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


def test_mlflow_is_missing_or_silent(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:secret@127.0.0.1:{free_port()}")
    for action in (lambda: publish.publish(out), lambda: publish.fetch("models:/pomona/1")):
        start = time.monotonic()
        with pytest.raises(RequestError, match="and does it answer") as told:
            action()
        assert "secret" not in str(told.value)
        assert time.monotonic() - start < 30
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="pip install 'pomona"):
        publish.publish(out)


# --- the comparison ----------------------------------------------------------------------------


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
    found = artifact.load_model(out / "model")
    shutil.copytree(out / "model", out / "other")
    others = {**found.about["weights"], "digest": "of others"}
    artifact.write_about(out / "other", {**bare(found.about), "weights": others})
    table = read_json(folder.table_file)
    source = shutil.copytree(table["source"], tmp_path / "photos")
    (source / "Test" / "Fruit 0" / "0_100.jpg").unlink()
    write_json(folder.table_file, {**table, "source": str(source)})
    with pytest.raises(SourceError, match=r"Test/Fruit 0/0_100\.jpg in .* is unreadable now"):
        comparison.compare(folder, found, artifact.load_model(out / "other"))
    # The version is registered all the same.
    shutil.copytree(out / "model", tmp_path / "mine")
    shutil.rmtree(out / "model")
    shutil.copytree(out / "other", out / "model")
    publish.publish(out)
    shutil.rmtree(out / "model")
    shutil.copytree(tmp_path / "mine", out / "model")
    told = publish.publish(out)
    assert (told["version"], told["aliases"]) == ("2", ["challenger"])
    assert told["why"].startswith("not promoted: no comparison with version 1: it needs the photos")


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
    found = artifact.load_model(out / "model")
    folder = layout.open_out(out)
    write_json(folder.table_file, {**read_json(folder.table_file), "label": "top"})
    figures = comparison.compare(folder, found, found)
    assert (figures["by"], figures["units"], figures["p_value"]) == ("group", 3, 1)


def test_no_test_photos(out: Path) -> None:
    publish.publish(out)
    shutil.rmtree(out / "test_pca")
    put(out, wrong(out) if (out / "test_pca").exists() else flipped(out))
    told = publish.publish(out)
    assert told["aliases"] == ["challenger"]
    assert "there are no Test photos" in told["why"]


def flipped(out: Path) -> Head:
    head = artifact.load_model(out / "model").head()
    return replace(head, classifier=replace(head.classifier, weight=-head.classifier.weight))


def test_a_champion_whose_files_are_gone(out: Path) -> None:
    publish.publish(out)
    shutil.rmtree(next((out / "mlflow-artifacts" / "models").iterdir()) / "artifacts")
    put(out, flipped(out))
    told = publish.publish(out)
    assert told["aliases"] == ["challenger"]
    assert "no comparison with version 1" in told["why"]


# --- fetching ----------------------------------------------------------------------------------


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


def test_what_cant_be_fetched(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="set MLFLOW_TRACKING_URI"):
        publish.fetch("models:/pomona@champion")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'no.db'}")
    with pytest.raises(RequestError, match="there is no such file"):
        publish.fetch("models:/pomona@champion")
    assert not (tmp_path / "no.db").exists()
    registry_uri = store(out)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry_uri)
    told = r"there is no models:/\S+ in MLflow: pomona publish"
    with pytest.raises(RequestError, match=told):
        publish.fetch("models:/pomona@champion")
    publish.publish(out)
    for uri in ("models:/pomona@best", "models:/pomona/7", "models:/pear@champion"):
        with pytest.raises(RequestError, match=told):
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


# --- serving -----------------------------------------------------------------------------------


def answer(found: artifact.Model, content: bytes | None) -> dict[str, Any]:
    batch = pa.record_batch({"content": pa.array([content], pa.binary())})
    (answered,) = recognise(iter([batch]), make_recogniser(found))
    return dict(answered.to_pylist()[0])


def test_what_the_column_may_hold(out: Path) -> None:
    good = photo(5)
    text = base64.b64encode(good).decode()
    lines = "\n".join(text[n : n + 76] for n in range(0, len(text), 76))
    served = pyfunc._load_pyfunc(str(out / "model"))
    cells = [good, text, lines, "no base64!", "Zm9v", "", None, float("nan"), memoryview(good)]
    rows = served.predict([{"image": cell} for cell in cells]).to_dict(orient="records")
    wanted = answer(artifact.load_model(out / "model"), good)
    assert [rows[n] for n in (0, 1, 2, 8)] == [wanted] * 4
    assert [row["error"] for row in rows[3:8]] == [
        *["not_an_image"] * 2,
        "empty",
        *["unreadable"] * 2,
    ]
    assert rows[3] == {**dict.fromkeys(wanted), "error": "not_an_image"}
    assert len(served.predict([{"image": good}], {"top": 1})["nearest"][0]) == 1
    assert served.predict([]).empty
    with pytest.raises(RequestError, match="--top is at least 1"):
        served.predict([{"image": good}], {"top": 0})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def server(out: Path, tmp_path: Path) -> Iterator[str]:
    """``mlflow models serve``, as a user starts it."""
    publish.publish(out)
    port = free_port()
    command = "-m mlflow models serve -m models:/pomona@champion --env-manager local -p"
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    log = (tmp_path / "server.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, *command.split(), str(port)],
        env={**os.environ, "MLFLOW_TRACKING_URI": store(out), "PATH": tools},
        cwd=tmp_path,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 90
        while not answers(f"{address}/ping"):
            told = (tmp_path / "server.log").read_text()
            assert process.poll() is None, told
            assert time.monotonic() < until, told
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def test_mlflow_serves_it(server: str, out: Path) -> None:
    good = photo(5)
    text = base64.b64encode(good).decode()

    def ask(body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{server}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["predictions"]

    found = artifact.load_model(out / "model")
    (row,) = ask({"dataframe_split": {"columns": ["image"], "data": [[text]]}})
    assert row == answer(found, good)
    rows = ask({"inputs": [{"image": text}, {"image": "no base64!"}], "params": {"top": 2}})
    assert rows[0]["nearest"] == row["nearest"][:2]
    assert rows[1] == answer(found, b"no image")
