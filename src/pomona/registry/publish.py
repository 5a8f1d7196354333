"""The stage ``publish``: a model becomes a version in MLflow's registry, and maybe the champion.

::

    publish ── compare    the challenger and the present champion on the same Test photos
            └─ _register  the version: model folder, Pomona's own code, signature, requirements

``fetch`` goes the other way: from ``models:/NAME@champion`` to the folder that `model.load` reads.
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
from pomona.core.files import cache_folder, read_json
from pomona.core.progress import OnTick, Tick, quiet
from pomona.model import artifact
from pomona.model.artifact import Model
from pomona.model.comparison import compare
from pomona.registry import pyfunc, tracking
from pomona.workspace import layout
from pomona.workspace.layout import Out

CHAMPION, CHALLENGER = "champion", "challenger"
SURE = 0.05
"""The champion changes below this p-value."""
DIGEST = "model_digest"
"""The tag of a version that tells which model it is."""


@dataclass(frozen=True)
class PublishOptions:
    """How a model becomes a version; see ``pomona publish --help``."""

    name: str = "pomona"
    promote: str | None = None  # a reason


def publish(
    out: str | Path, options: PublishOptions | None = None, on_tick: OnTick = quiet
) -> dict[str, Any]:
    """Register ``OUT/model``, and make it the champion if it beats the present one.

    The version gets the alias ``challenger``. It gets ``champion`` too if there is none yet, if it
    is right more often than the champion on the same Test photos with p < 0.05
    (`pomona.model.metrics.paired_test`), or if ``options.promote`` says so. A model that has a
    version already keeps it.

    Returns
    -------
    dict
        ``name``, ``version``, ``registered`` (false: it was there), ``aliases`` (set now),
        ``run`` (MLflow's id), ``store``, ``why`` (a sentence), and ``comparison``: what `compare`
        returns and ``champion`` (its version), or None.

    Raises
    ------
    RequestError
        And its kinds: there is no model, MLflow is missing or doesn't answer. Nothing is
        registered then.
    """
    options = options or PublishOptions()
    _check(options)
    folder = layout.open_out(out, must_exist=True)
    with layout.lock(folder):
        found = artifact.load_model(folder.model)
        with _connected(tracking.store_of(folder)) as client:
            return _publish(_Shelf(client, options.name), folder, found, options, on_tick)


def _check(options: PublishOptions) -> None:
    if not options.name.strip() or re.search(r"[/:@]", options.name):
        raise RequestError(f"--name is a word without / : and @, not {options.name!r}")
    if options.promote is not None and not options.promote.strip():
        raise RequestError('--promote takes a reason: --promote "the new labels matter more"')


@contextlib.contextmanager
def _connected(uri: str) -> Iterator[Any]:
    """Give a client of MLflow's; what goes wrong there becomes one line."""
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


# --- the decision ------------------------------------------------------------------------------


class _Shelf:
    """The versions of one name."""

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
        """Return the version that is this model, or None."""
        if not self.exists:
            return None
        versions = self.client.search_model_versions(
            f"name='{self.name}' and tags.{DIGEST}='{digest}'"
        )
        return versions[0] if versions else None


def _publish(
    shelf: _Shelf, out: Out, found: Model, options: PublishOptions, on_tick: OnTick
) -> dict[str, Any]:
    on_tick(Tick("publish"))
    own, champion = shelf.version_of(found.about["digest"]), shelf.aliases.get(CHAMPION)
    record: dict[str, Any] = {"name": shelf.name, "store": _shown_store(out), "comparison": None}
    if own is not None and str(own.version) == str(champion):
        record |= {"version": str(champion), "registered": False, "aliases": [], "run": own.run_id}
        return {**record, "why": f"this model is version {champion} already, the champion"}
    better, why, compared = _judge(shelf, out, found, on_tick)
    tags = {name: str(value) for name, value in (compared or {}).items()}
    if options.promote is not None:
        tags["promotion_reason"] = options.promote
        why = why if better else f"champion by --promote ({options.promote}); on its own {why}"
        better = True
    tags["why"] = why
    record["registered"] = own is None
    with contextlib.ExitStack() as undo:
        if own is None:
            own = _register(shelf, out, found, undo)
        for name, value in tags.items():
            shelf.client.set_model_version_tag(shelf.name, own.version, name, value)
        aliases = [CHALLENGER, CHAMPION] if better else [CHALLENGER]
        for alias in aliases:
            shelf.client.set_registered_model_alias(shelf.name, alias, own.version)
        undo.pop_all()
    record |= {"version": str(own.version), "aliases": aliases, "run": own.run_id}
    return {**record, "comparison": compared, "why": why}


def _shown_store(out: Out) -> str:
    return tracking.without_password(tracking.store_of(out))


def _judge(
    shelf: _Shelf, out: Out, found: Model, on_tick: OnTick
) -> tuple[bool, str, dict[str, Any] | None]:
    """Return whether the model becomes champion, why, and the comparison if there was one."""
    version = shelf.aliases.get(CHAMPION)
    if version is None:
        return True, "champion: there was none", None
    try:
        champion = artifact.load_model(_fetch(shelf.client, f"models:/{shelf.name}/{version}"))
        figures = compare(out, found, champion, on_tick)
    except PomonaError as error:  # the version is worth keeping; only the comparison can't be made
        return False, f"not promoted: no comparison with version {version}: {error}", None
    better = figures["accuracy"] > figures["accuracy_champion"]
    sure = better and figures["p_value"] < SURE
    start = "champion" if sure else "not promoted"
    doubt = f", which may be chance (p < {SURE} is asked for)" if better and not sure else ""
    what = "" if figures["by"] == "photo" else f" in {figures['units']} groups"
    why = (
        f"{start}: right on {figures['accuracy']:.2%} of {figures['photos']:,} Test photos{what}, "
        f"version {version} on {figures['accuracy_champion']:.2%} "
        f"(p = {figures['p_value']:.2g}){doubt}"
    )
    return sure, why, {"champion": str(version), **figures}


# --- the version -------------------------------------------------------------------------------


def _register(shelf: _Shelf, out: Out, found: Model, undo: contextlib.ExitStack) -> Any:
    """Make a version. ``undo`` gets what takes every step back."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    client, name = shelf.client, shelf.name

    def on_failure(action: Callable[..., object], *arguments: object) -> None:
        def attempt() -> None:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                action(*arguments)

        undo.callback(attempt)

    if (run := tracking.recorded_run(client, out)) is None:
        run = _new_run(client, out, found)
        on_failure(client.delete_run, run)
    experiment = client.get_run(run).info.experiment_id
    logged = client.create_logged_model(experiment, name=name, source_run_id=run)
    on_failure(client.delete_logged_model, logged.model_id)
    with tempfile.TemporaryDirectory() as spare:
        pyfunc.save(Path(spare, "model"), found, run, logged)
        client.log_model_artifacts(logged.model_id, str(Path(spare, "model")))
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run, [LoggedModelOutput(logged.model_id, step=0)])
    if not shelf.exists:
        client.create_registered_model(name)
        on_failure(client.delete_registered_model, name)
    version = client.create_model_version(
        name,
        f"models:/{logged.model_id}",
        run,
        tags={DIGEST: found.about["digest"], "pomona": pomona.__version__},
        model_id=logged.model_id,
    )
    on_failure(client.delete_model_version, name, version.version)
    return version


def _new_run(client: Any, out: Out, found: Model) -> str:
    stages = read_json(out.manifest).get("stages", {})
    if stages.get("train", {}).get("digests") != found.about["digests"]:
        stages.pop("train", None)  # of another model: this one was put there by hand
    params, numbers = tracking.figures(stages)
    return tracking.new_run(client, out, params, numbers, tracking.artifacts(out))


# --- fetching ----------------------------------------------------------------------------------


def fetch(uri: str) -> Path:
    """Download a model and return the folder that `load_model` reads. Runs no code of it.

    Parameters
    ----------
    uri
        ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or ``runs:/RUN/model``, looked up at
        ``MLFLOW_TRACKING_URI`` (and ``MLFLOW_REGISTRY_URI``). A version that was fetched before
        comes from the cache folder.

    Raises
    ------
    RequestError
        If there is no such model, it isn't Pomona's, or MLflow doesn't answer.
    MismatchError
        If a file of it was changed.
    MissingError
        If MLflow isn't installed.
    """
    where = os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get("MLFLOW_REGISTRY_URI")
    if not where:
        raise RequestError(
            f"{uri} is in no known place: set MLFLOW_TRACKING_URI to the server, or to "
            "sqlite:////…/OUT/mlflow.db"
        )
    database = re.fullmatch(r"sqlite:///(.+)", where)
    if database and not Path(database[1]).exists():  # MLflow would make an empty one
        raise RequestError(f"MLFLOW_TRACKING_URI names {database[1]}, and there is no such file")
    with _connected(where) as client:
        return _fetch(client, uri)


def _fetch(client: Any, uri: str) -> Path:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    shelf = cache_folder() / "models"
    try:
        digest = _digest_of(client, uri)
        if digest and _is_whole(shelf / digest):
            return shelf / digest
        shelf.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=shelf) as spare:
            place = Path(download_artifacts(artifact_uri=uri, dst_path=spare))
            return _keep(place, shelf, uri, digest)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise RequestError(
            f"there is no {uri} in MLflow: pomona publish --out OUT registers versions and gives "
            f"them the aliases {CHALLENGER} and {CHAMPION}"
        ) from error


def _digest_of(client: Any, uri: str) -> str | None:
    """Return which model a version is; None for other URIs and versions that Pomona didn't make."""
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


def _is_whole(folder: Path) -> bool:
    try:
        return bool(artifact.load_model(folder).about["digest"] == folder.name)
    except RequestError:
        return False


def _keep(place: Path, shelf: Path, uri: str, digest: str | None) -> Path:
    """Check what was downloaded and put its model into the cache."""
    found = sorted(place.rglob("model.json"), key=lambda path: len(path.parts))
    if not found:
        raise RequestError(f"{uri} holds no model of Pomona's: pomona publish registers one")
    whole = artifact.load_model(found[0].parent)
    if digest and whole.about["digest"] != digest:
        raise MismatchError(
            f"{uri} was changed: it isn't the model that was registered; publish it again"
        )
    kept = shelf / str(whole.about["digest"])
    if not _is_whole(kept):
        shutil.rmtree(kept, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was quicker
            whole.folder.rename(kept)
    return kept
