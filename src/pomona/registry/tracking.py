"""MLflow runs: one for each ``pomona run``, which an MLflow server that is down can't fail."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pomona.core.errors import first_line
from pomona.core.files import read_json, sync_folder, sync_tree
from pomona.core.uris import local_path
from pomona.workspace import layout
from pomona.workspace.layout import Out

log = logging.getLogger("pomona")

STAGE = "track"
"""Entry of ``OUT/manifest.json`` with the store and the id of the last run."""

_SETTINGS = {
    # A server that is down must not delay the run: by default MLflow tries seven times for 120 s.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # Otherwise a uv.lock in the working directory decides a version's requirements.
    "MLFLOW_UV_AUTO_DETECT": "false",
    # MLflow reports its use to its developers, and `pomona run` needs no network.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""MLflow's settings, if the user has set none."""


def is_installed() -> bool:
    """Tell whether MLflow can be imported."""
    return find_spec("mlflow") is not None


def store_of(out: Out) -> str:
    """Return ``MLFLOW_TRACKING_URI``, or `own_store`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or own_store(out)


def own_store(out: Out) -> str:
    """Return the URI of the database in OUT."""
    return f"sqlite:///{out.root / 'mlflow.db'}"


def without_password(text: str) -> str:
    """Return a text without user names and passwords in its URIs.

    >>> without_password("https://ann:secret@host/x failed")
    'https://host/x failed'
    """
    return re.sub(r"//[^/@\s]+@", "//", text)


def keep(location: str) -> None:
    """Return when artifacts are on the disk, where they lie on one of this machine's."""
    if location.startswith("file:") or not re.match(r"[A-Za-z][\w+.-]+:", location):
        path = local_path(location)
        sync_tree(path)
        for folder in [*path.parents][:4]:  # those of the store, which may be new
            sync_folder(folder)


@contextlib.contextmanager
def connected(uri: str) -> Iterator[Any]:
    """Give an MlflowClient of a store; meanwhile MLflow is quiet, gives up soon and uses it.

    That concerns what MLflow itself looks up (``models:/NAME@alias``). The registry may be another
    one by ``MLFLOW_REGISTRY_URI``.
    """
    settings = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    settings["MLFLOW_TRACKING_URI"] = uri
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        with _quiet():
            from mlflow import MlflowClient

            yield MlflowClient(tracking_uri=uri)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(mlflow|sqlalchemy|alembic|pydantic)(\.|$)")
        import mlflow  # noqa: F401 - sets the levels of its loggers, so it comes first

        loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
        before = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def figures(records: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the parameters and metrics of a run.

    ``records`` are the stages', as in the manifest: ``extract``, ``reduce``, ``train`` if it ran.
    """
    extract, reduce = records["extract"], records["reduce"]
    settings = {k: v for k, v in extract["settings"].items() if k != "preprocessing"}
    params = {"source": extract["source"], **settings, **reduce["made_from"]["settings"]}
    metrics = {
        "photos": extract["photos"],
        "labels": extract["labels"],
        "rejected": sum(extract["rejected"].values()),
        "photos_computed": extract["times"]["computed"],
        "photos_per_second": extract["times"]["photos_per_second"],
        "components_kept": reduce["components"],
        "variance_kept": reduce["variance_kept"],
        **{f"seconds_{k}": v for k, v in extract["times"]["seconds"].items()},
        **{f"seconds_{k}": v for k, v in reduce["times"]["seconds"].items()},
    }
    train = records.get("train", {})
    if "made_from" in train:  # it wasn't skipped
        params |= _train_params(train)
        metrics |= _train_metrics(train)
    return params, {k: float(v) for k, v in metrics.items() if v is not None}


def _train_params(train: dict[str, Any]) -> dict[str, Any]:
    settings = train["made_from"]["settings"]
    return {
        "model": train["digests"]["model.onnx"][:12],
        **{name: settings[name] for name in ("class_weight", "max_rows")},
        **{name: train[name] for name in ("strength", "temperature")},
        **{f"unknown_{name}": train["unknown"][name] for name in ("method", "threshold", "keep")},
    }


def _train_metrics(train: dict[str, Any]) -> dict[str, Any]:
    """Return metrics by flat names: ``test_accuracy``, ``test_accuracy_low``, ``cv_accuracy`` …."""
    metrics = {f"seconds_train_{k}": v for k, v in train["times"]["seconds"].items()}
    for part, prefix in (("cross_validation", "cv"), ("test", "test")):
        for name, value in train["metrics"].get(part, {}).items():
            if isinstance(value, dict):
                metrics[f"{prefix}_{name}"] = value["value"]
                metrics |= {f"{prefix}_{name}_{bound}": value[bound] for bound in ("low", "high")}
            elif not isinstance(value, str):
                metrics[f"{prefix}_{name}"] = value
    return metrics


def artifacts(out: Out) -> list[Path]:
    """Return the files and folders to upload: report, model, manifest, rejected photos."""
    return [out.report, out.model, out.manifest, out.rejected]


Curves = Mapping[str, Sequence[tuple[int, float]]]
"""(step, value) of each curve."""


def record(
    out: Out,
    params: dict[str, Any],
    metrics: dict[str, float],
    files: Sequence[Path],
    curves: Curves | None = None,
) -> str:
    """Write a run to ``MLFLOW_TRACKING_URI``, or to ``OUT/mlflow.db``. Never raises.

    Returns a sentence to show: where it was written, or why it wasn't.
    """
    if not is_installed():
        return "not recorded: MLflow isn't installed (pip install 'pomona[track]')"
    uri = store_of(out)
    try:
        with connected(uri) as client:
            run_id = new_run(client, out, params, metrics, files, curves)
    except Exception as error:  # the run itself succeeded
        log.warning("MLflow failed", exc_info=error)
        reason = first_line(error)[:200]
        return without_password(f"not recorded: MLflow at {uri} failed ({reason})")
    return without_password(f"{uri}, run {run_id}")


def new_run(
    client: Any,
    out: Out,
    params: dict[str, Any],
    metrics: dict[str, float],
    files: Sequence[Path],
    curves: Curves | None = None,
) -> str:
    """Write a run, note it in the manifest, and return its id.

    Files and folders have the same relative paths in the run as in OUT; missing ones are left out.
    """
    run_id = str(client.create_run(_experiment(client, out), run_name=out.root.name).info.run_id)
    status = "FAILED"
    try:
        _log_figures(client, run_id, params, metrics, curves or {})
        for path in files:
            if path.is_dir():
                client.log_artifacts(run_id, str(path), path.name)
            elif path.exists():
                is_inside = path.parent != out.root and path.is_relative_to(out.root)
                folder = path.parent.relative_to(out.root).as_posix() if is_inside else None
                client.log_artifact(run_id, str(path), folder)
        keep(client.get_run(run_id).info.artifact_uri)
        status = "FINISHED"
    finally:
        client.set_terminated(run_id, status)
    layout.update(out, STAGE, {**_identity(out), "run": run_id})
    return run_id


def _log_figures(
    client: Any, run_id: str, params: dict[str, Any], metrics: dict[str, float], curves: Curves
) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    entries = [Metric(name, value, now, 0) for name, value in metrics.items()]
    for name, curve in curves.items():
        entries += [Metric(f"curve_{name}", value, now, step) for step, value in curve]
    client.log_batch(run_id, entries, [Param(name, str(value)) for name, value in params.items()])


def _identity(out: Out) -> dict[str, str | None]:
    """Return store and model, by which `recorded_run` knows a run of this very model."""
    return {"store": without_password(store_of(out)), "model": model_digest(out)}


def _experiment(client: Any, out: Out) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "pomona")
    if (experiment := client.get_experiment_by_name(name)) is not None:
        return str(experiment.experiment_id)
    # Beside the database, which several OUTs may share; MLflow would take the working directory.
    database = re.fullmatch(r"sqlite:///(.+)", store_of(out))
    folder = Path(database[1]).resolve().parent / "mlflow-artifacts" if database else None
    return str(client.create_experiment(name, artifact_location=folder and folder.as_uri()))


def recorded_run(client: Any, out: Out) -> str | None:
    """Return the id of the run of OUT's present model in its store, or None."""
    from mlflow.exceptions import MlflowException

    recorded = read_json(out.manifest).get("stages", {}).get(STAGE, {})
    if {name: recorded.get(name) for name in ("store", "model")} != _identity(out):
        return None
    try:
        run = client.get_run(recorded["run"]).info
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return str(run.run_id) if run.lifecycle_stage == "active" else None


def model_digest(out: Out) -> str | None:
    """Return the digest in ``OUT/model/model.json``; None if there is no model."""
    try:
        return str(json.loads((out.model / "model.json").read_bytes())["digest"])
    except (OSError, ValueError, KeyError):
        return None
