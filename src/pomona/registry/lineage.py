"""Which models were trained with a photo: OUT's own, and versions in MLflow's registries."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pomona.core.errors import first_line
from pomona.core.files import read_json
from pomona.core.uris import local_path
from pomona.model import projection
from pomona.model.unknown import squared_distances
from pomona.registry import publish, tracking
from pomona.workspace import feature_table
from pomona.workspace.layout import Out

log = logging.getLogger("pomona")

YES, PERHAPS = "yes", "perhaps"
PAGE = 200  # versions in one request


@dataclass(frozen=True)
class Lineage:
    """Evidence that a model was trained with some Training photos of OUT.

    ``features`` and ``training_pca`` are digests of the tables that hold the photos; None if that
    table holds none of them. A model of the same source and of other tables belongs to an earlier
    or later state of OUT, and may have seen the photos.
    """

    features: str | None
    training_pca: str | None
    source: str
    possible: bool  # whether any of the photos may have been a Training photo at all
    vectors: npt.NDArray[np.float32]  # features of the photos, [n, 1280]

    def saw(self, about: dict[str, Any]) -> str | None:
        """Return whether a model saw a photo, by its ``model.json``: `YES`, `PERHAPS` or None."""
        trained_on = about.get("trained_on", {})
        digests = about.get("made_from", {}).get("digests", {})
        if self.features and trained_on.get("features") == self.features:
            return YES
        if self.training_pca and digests.get("training_pca") == self.training_pca:
            return YES
        return PERHAPS if self.possible and trained_on.get("source") == self.source else None

    def holds(self, folder: Path, about: dict[str, Any]) -> bool:
        """Tell whether a photo's vector is a centre of the model's detector of unknown photos."""
        from safetensors.numpy import load_file

        tensors = load_file(folder / "classifier.safetensors")
        if "detector.centres" not in tensors or not len(self.vectors):
            return False
        raised = projection.raised(self.vectors, float(about["power"]))
        z = (raised - tensors["mean"]) @ tensors["linear"].T @ tensors["detector.whitening"]
        centres = tensors["detector.centres"]
        norms = (z**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)
        return bool((squared_distances(z, centres) < 1e-6 * norms).any())


def of(out: Out, *, in_pca: bool, unseen: bool, vectors: npt.NDArray[np.float32]) -> Lineage:
    """Return the evidence about some photos of OUT.

    ``in_pca``: ``training_pca`` holds one of them. ``unseen``: one is in no table now, so that its
    earlier split isn't known. ``vectors``: features of Training photos in ``OUT/features``.
    """
    reduced = read_json(out.manifest).get("stages", {}).get("reduce", {})
    return Lineage(
        feature_table.digest(out) if len(vectors) else None,
        reduced.get("digests", {}).get("training_pca") if in_pca else None,
        Path(read_json(out.table_file)["source"]).name,
        in_pca or unseen or bool(len(vectors)),
        vectors,
    )


def versions(out: Out, evidence: Lineage) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the registered versions that saw a photo, and the registries that can't be asked.

    Searches ``OUT/mlflow.db`` and ``MLFLOW_TRACKING_URI`` (and ``MLFLOW_REGISTRY_URI``). A version
    is what `_judge` returns, and its ``store``; a registry, a sentence.
    """
    records: list[dict[str, Any]] = []
    silent: list[str] = []
    if not evidence.possible:
        return records, silent
    for uri in _stores(out):
        shown = tracking.without_password(uri)
        if not tracking.is_installed():
            silent.append(f"{shown}: MLflow isn't installed (pip install 'pomona[mlflow]')")
            continue
        try:
            with tracking.connected(uri) as client:
                records += [{"store": shown, **one} for one in _versions(client, evidence)]
        except Exception as error:  # noqa: BLE001 - the photo is erased whether MLflow answers or not
            reason = tracking.without_password(first_line(error)[:200])
            silent.append(f"{shown}: {reason}")
    return records, silent


def _stores(out: Out) -> list[str]:
    own = tracking.own_store(out)
    stores = [own] if (out.root / "mlflow.db").exists() else []
    configured = tracking.store_of(out)
    return stores if configured == own else [*stores, configured]


def _versions(client: Any, evidence: Lineage) -> Iterator[dict[str, Any]]:
    token = None
    while True:
        page = client.search_model_versions(max_results=PAGE, page_token=token)
        for version in page:
            if publish.DIGEST in version.tags and (record := _judge(client, version, evidence)):
                yield record
        if not (token := page.token):
            return


def retire(out: Out, records: list[dict[str, Any]]) -> None:
    """Delete versions from the registry in OUT, with their files, and set ``retired``.

    Versions in other registries stay: retiring those is up to their owner.
    """
    store = tracking.own_store(out)
    if not (own := [record for record in records if record["store"] == store]):
        return
    with tracking.connected(store) as client:
        for record in own:
            version = client.get_model_version(record["name"], record["version"])
            client.delete_model_version(record["name"], record["version"])
            if model_id := re.fullmatch(r"models:/(m-\w+)", str(version.source)):
                logged = client.get_logged_model(model_id[1])
                client.delete_logged_model(model_id[1])
                files = local_path(str(logged.artifact_location))
                if files.is_relative_to(out.root):
                    shutil.rmtree(files, ignore_errors=True)
            record["retired"] = True


def _judge(client: Any, version: Any, evidence: Lineage) -> dict[str, Any] | None:
    """Return the record of a version that saw a photo; None for other versions."""
    from mlflow.artifacts import download_artifacts

    uri = f"models:/{version.name}/{version.version}/data/model"
    holds: bool | None = None
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = download_artifacts(f"{uri}/model.json", dst_path=folder)
            about = read_json(Path(file))
            if (saw := evidence.saw(about)) is None:
                return None
            tensors = download_artifacts(f"{uri}/classifier.safetensors", dst_path=folder)
            holds = evidence.holds(Path(tensors).parent, about)
    except Exception as error:  # its files are gone or damaged, so it can't be cleared
        log.warning("version %s of %s can't be read", version.version, version.name, exc_info=error)
        saw = PERHAPS
    aliases = client.get_registered_model(version.name).aliases
    return {
        "name": version.name,
        "version": str(version.version),
        "aliases": sorted(a for a, v in aliases.items() if str(v) == str(version.version)),
        "run": version.run_id,
        "model_digest": version.tags[publish.DIGEST],
        "trained_with": saw,
        "holds_vector": holds,
        "retired": False,
    }
