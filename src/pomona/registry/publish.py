"""The stage ``publish``: a model becomes a version in MLflow's registry, and maybe the champion.

`fetch` goes the other way: from ``models:/NAME@champion`` to a folder that
`pomona.model.artifact.load_model` reads.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pomona
from pomona.core.errors import MismatchError, MissingError, PomonaError, RequestError, first_line
from pomona.core.files import cache_folder, read_json, sync_folder, sync_tree
from pomona.core.progress import OnTick, Tick, quiet
from pomona.model import artifact, signature
from pomona.model.artifact import Model
from pomona.model.comparison import compare
from pomona.registry import pyfunc, tracking
from pomona.workspace import layout
from pomona.workspace.layout import Out

CHAMPION, CHALLENGER = "champion", "challenger"
SIGNIFICANCE = 0.05
"""A better challenger becomes champion below this p-value."""
DIGEST = "model_digest"
"""Tag of a version: the digest of its model."""


@dataclass(frozen=True)
class PublishOptions:
    """How a model becomes a version; see ``pomona publish --help``."""

    name: str = "pomona"
    promote: str | None = None  # the reason to make it champion whatever the comparison says
    sign: str | None = None  # a private key's file to sign it with first


def publish(
    out: str | Path, options: PublishOptions | None = None, on_tick: OnTick = quiet
) -> dict[str, Any]:
    """Register ``OUT/model``, and make it the champion if it beats the present one.

    The version gets the alias ``challenger``. It gets ``champion`` too if there is none yet, if it
    is right more often than the champion on the same Test photos with p < 0.05
    (`pomona.model.metrics.paired_test`), or if ``options.promote`` says so. A model that is
    registered already keeps its version.

    With ``options.sign`` it is signed first (`pomona.model.signature.sign`); a version that is
    there gets the new signature.

    Returns ``name``, ``version``, ``registered`` (False: it was there), ``signed`` (whether there
    is a signature), ``aliases`` (set now),
    ``run`` (MLflow's id), ``store``, ``why`` (a sentence), and ``comparison``: what `compare`
    returns and ``champion`` (its version), or None. Raises RequestError or a subclass if there is
    no model, or MLflow is missing or doesn't answer; nothing is registered then.
    """
    options = options or PublishOptions()
    _check(options)
    folder = layout.open_out(out, must_exist=True)
    with layout.lock(folder):
        model = artifact.load_model(folder.model)
        if options.sign:
            signature.sign(model.folder, model.files, options.sign)
        with _connected(tracking.store_of(folder)) as client:
            registered = RegisteredModel(client, options.name)
            return _publish(registered, folder, model, options, on_tick)


def _check(options: PublishOptions) -> None:
    if not options.name.strip() or re.search(r"[/:@]", options.name):
        raise RequestError(f"--name is a word without / : and @, not {options.name!r}")
    if options.promote is not None and not options.promote.strip():
        raise RequestError('--promote takes a reason: --promote "the new labels matter more"')


@contextlib.contextmanager
def _connected(uri: str) -> Iterator[Any]:
    """Yield an MLflow client, and turn MLflow's errors into a RequestError of one line."""
    if not tracking.is_installed():
        raise MissingError("MLflow isn't installed: pip install 'pomona[mlflow]'")
    try:
        with tracking.connected(uri) as client:
            yield client
    except PomonaError:
        raise
    except Exception as error:
        reason = first_line(error)[:200]
        raise RequestError(
            tracking.without_password(
                f"MLflow at {uri} failed ({reason}): is that MLFLOW_TRACKING_URI right, and does "
                "it answer?"
            )
        ) from error


class RegisteredModel:
    """A name in the registry, which may not exist yet, and its versions."""

    def __init__(self, client: Any, name: str) -> None:
        from mlflow.exceptions import MlflowException

        self.client, self.name = client, name
        self.exists, self.aliases = True, {}
        try:
            self.aliases = dict(client.get_registered_model(name).aliases)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self.exists = False

    def version_of(self, digest: str) -> Any:
        """Return the version of the model with this digest, or None."""
        if not self.exists:
            return None
        condition = f"name='{self.name}' and tags.{DIGEST}='{digest}'"
        versions = self.client.search_model_versions(condition)
        return versions[0] if versions else None


def _publish(
    registered: RegisteredModel, out: Out, model: Model, options: PublishOptions, on_tick: OnTick
) -> dict[str, Any]:
    on_tick(Tick("publish"))
    version = registered.version_of(model.about["digest"])
    champion = registered.aliases.get(CHAMPION)
    store = tracking.without_password(tracking.store_of(out))
    record = {
        "name": registered.name,
        "store": store,
        "registered": version is None,
        "signed": (model.folder / signature.NAME).is_file(),
    }
    if version is not None and options.sign:
        _add_signature(registered.client, model, version)
    if version is not None and str(version.version) == str(champion):
        why = f"this model is version {champion} already, the champion"
        return {**record, **_about(version), "aliases": [], "comparison": None, "why": why}
    is_better, why, comparison = _judge(registered, out, model, on_tick)
    tags = {name: str(value) for name, value in (comparison or {}).items()}
    if options.promote is not None:
        tags["promotion_reason"] = options.promote
        if not is_better:
            why = f"champion by --promote ({options.promote}); on its own {why}"
        is_better = True
    aliases = [CHALLENGER, CHAMPION] if is_better else [CHALLENGER]
    with contextlib.ExitStack() as undo:
        if version is None:
            version = _register(registered, out, model, undo)
        for name, value in {**tags, "why": why}.items():
            registered.client.set_model_version_tag(registered.name, version.version, name, value)
        for alias in aliases:
            registered.client.set_registered_model_alias(registered.name, alias, version.version)
        undo.pop_all()
    return {**record, **_about(version), "aliases": aliases, "comparison": comparison, "why": why}


def _about(version: Any) -> dict[str, Any]:
    return {"version": str(version.version), "run": version.run_id}


def _judge(
    registered: RegisteredModel, out: Out, model: Model, on_tick: OnTick
) -> tuple[bool, str, dict[str, Any] | None]:
    """Return whether the model becomes champion, why, and the comparison if there was one."""
    version = registered.aliases.get(CHAMPION)
    if version is None:
        return True, "champion: there was none", None
    uri = f"models:/{registered.name}/{version}"
    try:
        champion = artifact.load_model(_fetch(registered.client, uri))
        figures = compare(out, model, champion, on_tick)
    except PomonaError as error:  # the version is registered all the same, without a comparison
        return False, f"not promoted: no comparison with version {version}: {error}", None
    is_better = figures["accuracy"] > figures["accuracy_champion"]
    is_sure = is_better and figures["p_value"] < SIGNIFICANCE
    verdict = "champion" if is_sure else "not promoted"
    may_be_chance = is_better and not is_sure
    doubt = f", which may be chance (p < {SIGNIFICANCE} is asked for)" if may_be_chance else ""
    groups = "" if figures["by"] == "photo" else f" in {figures['units']} groups"
    why = (
        f"{verdict}: right on {figures['accuracy']:.2%} of {figures['photos']:,} Test photos"
        f"{groups}, version {version} on {figures['accuracy_champion']:.2%} "
        f"(p = {figures['p_value']:.2g}){doubt}"
    )
    return is_sure, why, {"champion": str(version), **figures}


def _register(
    registered: RegisteredModel, out: Out, model: Model, undo: contextlib.ExitStack
) -> Any:
    """Register a version and return it. ``undo`` gets the reversal of each step."""
    client, name = registered.client, registered.name
    if (run := tracking.recorded_run(client, out)) is None:
        run = _new_run(client, out, model)
        undo.callback(_attempt, client.delete_run, run)
    logged = _log_model(client, name, model, run, undo)
    if not registered.exists:
        client.create_registered_model(name)
        undo.callback(_attempt, client.delete_registered_model, name)
    version = client.create_model_version(
        name,
        f"models:/{logged.model_id}",
        run,
        tags={DIGEST: model.about["digest"], "pomona": pomona.__version__},
        model_id=logged.model_id,
    )
    undo.callback(_attempt, client.delete_model_version, name, version.version)
    return version


def _attempt(action: Callable[..., object], *arguments: object) -> None:
    with contextlib.suppress(Exception):  # the error that led here is the one to report
        action(*arguments)


def _log_model(client: Any, name: str, model: Model, run: str, undo: contextlib.ExitStack) -> Any:
    """Upload the model's files as an output of a run; returns MLflow's logged model."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    experiment = client.get_run(run).info.experiment_id
    logged = client.create_logged_model(experiment, name=name, source_run_id=run)
    undo.callback(_attempt, client.delete_logged_model, logged.model_id)
    with tempfile.TemporaryDirectory() as folder:
        pyfunc.save(Path(folder, "model"), model, run, logged)
        client.log_model_artifacts(logged.model_id, str(Path(folder, "model")))
    tracking.keep(logged.artifact_location)
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run, [LoggedModelOutput(logged.model_id, step=0)])
    return logged


def _add_signature(client: Any, model: Model, version: Any) -> None:
    """Put the model's signature beside its files in a version that is there."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, pyfunc.FOLDER)
        place.mkdir(parents=True)
        shutil.copy(model.folder / signature.NAME, place)
        client.log_model_artifacts(str(version.source).removeprefix("models:/"), folder)


def _new_run(client: Any, out: Out, model: Model) -> str:
    records = read_json(out.manifest).get("stages", {})
    if records.get("train", {}).get("digests") != model.about["digests"]:
        records.pop("train", None)  # the record of another model: this one was copied into OUT
    params, metrics = tracking.figures(records)
    return tracking.new_run(client, out, params, metrics, tracking.artifacts(out))


def fetch(uri: str, verify: str | None = None) -> Path:
    """Download a model and return a folder that `load_model` reads. Runs no code of the model.

    The URI is ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or ``runs:/RUN/model``, looked up at
    ``MLFLOW_TRACKING_URI`` (and ``MLFLOW_REGISTRY_URI``). A version fetched before comes from the
    cache folder, if it is whole there, and signed as ``verify`` asks for (`load_model`; whether
    what is returned is signed so, loading tells). Raises RequestError if there is no such model,
    it isn't Pomona's, or MLflow doesn't answer; MismatchError if a file was changed; MissingError
    if MLflow isn't installed.
    """
    store = os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get("MLFLOW_REGISTRY_URI")
    if not store:
        raise RequestError(
            f"{uri} is in no known place: set MLFLOW_TRACKING_URI to the server, or to "
            "sqlite:////…/OUT/mlflow.db"
        )
    database = re.fullmatch(r"sqlite:///(.+)", store)
    if database and not Path(database[1]).exists():  # MLflow would create it
        raise RequestError(f"MLFLOW_TRACKING_URI names {database[1]}, and there is no such file")
    with _connected(store) as client:
        return _fetch(client, uri, verify)


def _fetch(client: Any, uri: str, verify: str | None = None) -> Path:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    cache = cache_folder() / "models"
    try:
        digest = _digest_of(client, uri)
        if digest and _is_intact(cache / digest, verify):
            return cache / digest
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            downloaded = Path(download_artifacts(artifact_uri=uri, dst_path=folder))
            return _move_to_cache(downloaded, cache, uri, digest, verify)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise RequestError(
            f"there is no {uri} in MLflow: pomona publish --out OUT registers versions and gives "
            f"them the aliases {CHALLENGER} and {CHAMPION}"
        ) from error


def _digest_of(client: Any, uri: str) -> str | None:
    """Return the digest of a version's model; None for other URIs and versions not by Pomona."""
    parts = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if parts is None:
        return None
    name, alias, number = parts.groups()
    if alias:
        version = client.get_model_version_by_alias(name, alias)
    else:
        version = client.get_model_version(name, number)
    digest = str(version.tags.get(DIGEST, ""))
    return digest if re.fullmatch("[0-9a-f]{64}", digest) else None


def _is_intact(folder: Path, verify: str | None) -> bool:
    try:
        return bool(artifact.load_model(folder, verify=verify).about["digest"] == folder.name)
    except RequestError:
        return False


def _move_to_cache(
    downloaded: Path, cache: Path, uri: str, digest: str | None, verify: str | None
) -> Path:
    """Check a download and move its model's folder into the cache."""
    manifests = sorted(downloaded.rglob("model.json"), key=lambda path: len(path.parts))
    if not manifests:
        raise RequestError(f"{uri} holds no model of Pomona's: pomona publish registers one")
    model = artifact.load_model(manifests[0].parent)
    if digest and model.about["digest"] != digest:
        raise MismatchError(
            f"{uri} was changed: it isn't the model that was registered; publish it again"
        )
    cached = cache / str(model.about["digest"])
    if not _is_intact(cached, verify):
        shutil.rmtree(cached, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was quicker
            sync_tree(model.folder)
            model.folder.rename(cached)
            sync_folder(cache)
    return cached
