"""Which models were trained with a photo: OUT's own, and the versions in MLflow's registries."""

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
PAGE = 200


@dataclass(frozen=True)
class Lineage:
    """What tells that a model was trained with some Training photos of OUT.

    Attributes
    ----------
    features, training_pca
        Digests of the tables that hold them; None: that table holds none.
    source
        The name of the source. A model of the same source but of other tables is one of an earlier
        or later state of OUT, and may have seen them.
    possible
        Whether any of the photos may have been a Training photo at all.
    vectors
        Features [n, 1280] of the photos.
    """

    features: str | None
    training_pca: str | None
    source: str
    possible: bool
    vectors: npt.NDArray[np.float32]

    def saw(self, about: dict[str, Any]) -> str | None:
        """Return whether a model saw one of the photos: ``yes``, ``perhaps``, or None for no.

        Parameters
        ----------
        about
            Its ``model.json``.
        """
        on, digests = about.get("trained_on", {}), about.get("made_from", {}).get("digests", {})
        if self.features and on.get("features") == self.features:
            return YES
        if self.training_pca and digests.get("training_pca") == self.training_pca:
            return YES
        return PERHAPS if self.possible and on.get("source") == self.source else None

    def holds(self, folder: Path, about: dict[str, Any]) -> bool:
        """Tell whether a model holds a photo's own vector (`pomona.model.unknown`: as a centre)."""
        from safetensors.numpy import load_file

        tensors = load_file(folder / "classifier.safetensors")
        if "detector.centres" not in tensors or not len(self.vectors):
            return False
        raised = projection.raised(self.vectors, float(about["power"]))
        z = (raised - tensors["mean"]) @ tensors["linear"].T @ tensors["detector.whitening"]
        centres = tensors["detector.centres"]
        far = squared_distances(z, centres)
        size = (z**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)
        return bool((far < 1e-6 * size).any())


def of(out: Out, *, in_pca: bool, unseen: bool, vectors: npt.NDArray[np.float32]) -> Lineage:
    """Return what tells the models of some photos.

    Parameters
    ----------
    in_pca
        Whether ``training_pca`` holds one of them.
    unseen
        Whether one of them is in no table now: what it was earlier isn't known.
    vectors
        Features of those that are Training photos in ``OUT/features``.
    """
    reduced = read_json(out.manifest).get("stages", {}).get("reduce", {})
    return Lineage(
        feature_table.digest(out) if len(vectors) else None,
        reduced.get("digests", {}).get("training_pca") if in_pca else None,
        Path(read_json(out.table_file)["source"]).name,
        in_pca or unseen or bool(len(vectors)),
        vectors,
    )


def versions(out: Out, wanted: Lineage) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the published versions that saw a photo, and the registries that can't be asked.

    Looks into ``OUT/mlflow.db`` and ``MLFLOW_TRACKING_URI`` (and ``MLFLOW_REGISTRY_URI``).

    Returns
    -------
    (list, list)
        For each version ``store``, ``name``, ``version``, ``aliases``, ``run``, ``model_digest``,
        ``trained_with`` (``yes``, ``perhaps``), ``holds_vector`` and ``retired`` (false); and a
        sentence for each registry.
    """
    found: list[dict[str, Any]] = []
    silent: list[str] = []
    if not wanted.possible:
        return found, silent
    for uri in _stores(out):
        shown = tracking.without_password(uri)
        if not tracking.is_installed():
            silent.append(f"{shown}: MLflow isn't installed (pip install 'pomona[mlflow]')")
            continue
        try:
            with tracking.connected(uri) as client:
                found += [{"store": shown, **one} for one in _versions(client, wanted)]
        except Exception as error:  # noqa: BLE001 - the photo is forgotten whatever MLflow says
            reason = tracking.without_password(first_line(error)[:200])
            silent.append(f"{shown}: {reason}")
    return found, silent


def _stores(out: Out) -> list[str]:
    own = tracking.own_store(out)
    stores = [own] if (out.root / "mlflow.db").exists() else []
    given = tracking.store_of(out)
    return stores if given == own else [*stores, given]


def _versions(client: Any, wanted: Lineage) -> Iterator[dict[str, Any]]:
    token = None
    while True:
        page = client.search_model_versions(max_results=PAGE, page_token=token)
        for version in page:
            if publish.DIGEST in version.tags and (told := _ask(client, version, wanted)):
                yield told
        token = page.token
        if not token:
            return


def retire(out: Out, found: list[dict[str, Any]]) -> None:
    """Delete versions from the registry in OUT, with their files; they get ``retired``.

    Versions in other registries stay: they are their owner's to retire.
    """
    own = tracking.own_store(out)
    mine = [one for one in found if one["store"] == own]
    if not mine:
        return
    with tracking.connected(own) as client:
        for one in mine:
            version = client.get_model_version(one["name"], one["version"])
            client.delete_model_version(one["name"], one["version"])
            if of_model := re.fullmatch(r"models:/(m-\w+)", str(version.source)):
                logged = client.get_logged_model(of_model[1])
                client.delete_logged_model(of_model[1])
                files = local_path(str(logged.artifact_location))
                if files.is_relative_to(out.root):
                    shutil.rmtree(files, ignore_errors=True)
            one["retired"] = True


def _ask(client: Any, version: Any, wanted: Lineage) -> dict[str, Any] | None:
    from mlflow.artifacts import download_artifacts

    start = f"models:/{version.name}/{version.version}/data/model"
    holds: bool | None = None
    try:
        with tempfile.TemporaryDirectory() as spare:
            file = download_artifacts(f"{start}/model.json", dst_path=spare)
            about = read_json(Path(file))
            if (saw := wanted.saw(about)) is None:
                return None
            tensors = download_artifacts(f"{start}/classifier.safetensors", dst_path=spare)
            holds = wanted.holds(Path(tensors).parent, about)
    except Exception as error:  # its files are gone or damaged: nothing clears it
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
