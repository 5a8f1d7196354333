"""MLflow: one run for one ``pomona run``. A server that doesn't answer never costs the run."""

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
from pomona.core.files import read_json
from pomona.workspace import layout
from pomona.workspace.layout import Out

log = logging.getLogger("pomona")

STAGE = "track"
"""Where ``OUT/manifest.json`` keeps the last run's store and id."""

_SETTINGS = {
    # A server that is down must not hold the run up: MLflow's default is seven tries of 120 s.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # Otherwise a uv.lock of the working directory decides what a version of the model needs.
    "MLFLOW_UV_AUTO_DETECT": "false",
    # MLflow reports its use to its makers, and `pomona run` needs no network.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Of MLflow's, where the user has set none."""


# --- the store ---------------------------------------------------------------------------------


def is_installed() -> bool:
    """Tell whether MLflow can be imported."""
    return find_spec("mlflow") is not None


def store_of(out: Out) -> str:
    """Return ``MLFLOW_TRACKING_URI``, or the store in OUT."""
    return os.environ.get("MLFLOW_TRACKING_URI") or own_store(out)


def own_store(out: Out) -> str:
    """Return the store in OUT."""
    return f"sqlite:///{out.root / 'mlflow.db'}"


def without_password(text: str) -> str:
    """Return a text whose URIs hold neither user nor password.

    >>> without_password("https://ann:secret@host/x failed")
    'https://host/x failed'
    """
    return re.sub(r"//[^/@\s]+@", "//", text)


@contextlib.contextmanager
def connected(uri: str) -> Iterator[Any]:
    """Give a client of a store. MLflow is quiet and gives up soon, until this is closed.

    What MLflow itself looks up (``models:/NAME@alias``) it looks up there too; the registry may be
    another by ``MLFLOW_REGISTRY_URI``.

    Yields
    ------
    mlflow.MlflowClient
    """
    wanted = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    wanted["MLFLOW_TRACKING_URI"] = uri
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
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
        import mlflow  # noqa: F401 - it sets its loggers' levels, so it comes before ours

        loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
        before = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


# --- what a run carries ------------------------------------------------------------------------


def figures(records: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the parameters and metrics of a run.

    Parameters
    ----------
    records
        By stage, as in the manifest: ``extract``, ``reduce``, and ``train`` if it ran.
    """
    first, second = records["extract"], records["reduce"]
    settings = {k: v for k, v in first["settings"].items() if k != "preprocessing"}
    params = {"source": first["source"], **settings, **second["made_from"]["settings"]}
    numbers = {
        "photos": first["photos"],
        "labels": first["labels"],
        "rejected": sum(first["rejected"].values()),
        "photos_computed": first["times"]["computed"],
        "photos_per_second": first["times"]["photos_per_second"],
        "components_kept": second["components"],
        "variance_kept": second["variance_kept"],
        **{f"seconds_{k}": v for k, v in first["times"]["seconds"].items()},
        **{f"seconds_{k}": v for k, v in second["times"]["seconds"].items()},
    }
    train = records.get("train", {})
    if "made_from" in train:  # it wasn't skipped
        params |= _train_params(train)
        numbers |= _train_metrics(train)
    return params, {k: float(v) for k, v in numbers.items() if v is not None}


def _train_params(train: dict[str, Any]) -> dict[str, Any]:
    settings = train["made_from"]["settings"]
    unknown = train["unknown"]
    return {
        "model": train["digests"]["model.onnx"][:12],
        "class_weight": settings["class_weight"],
        "max_rows": settings["max_rows"],
        "strength": train["strength"],
        "temperature": train["temperature"],
        "unknown_method": unknown["method"],
        "unknown_threshold": unknown["threshold"],
        "unknown_keep": unknown["keep"],
    }


def _train_metrics(train: dict[str, Any]) -> dict[str, Any]:
    """Flatten: ``test_accuracy``, ``test_accuracy_low``, …, ``cv_accuracy``, …."""
    found = {f"seconds_train_{k}": v for k, v in train["times"]["seconds"].items()}
    for part, start in (("cross_validation", "cv"), ("test", "test")):
        for name, value in train["metrics"].get(part, {}).items():
            if isinstance(value, dict):
                found[f"{start}_{name}"] = value["value"]
                found |= {f"{start}_{name}_{end}": value[end] for end in ("low", "high")}
            elif not isinstance(value, str):
                found[f"{start}_{name}"] = value
    return found


def artifacts(out: Out) -> list[Path]:
    """Return what goes with a run: the report and its pictures, the model, what ran."""
    return [out.report, out.model, out.manifest, out.rejected]


Curve = Sequence[tuple[int, float]]
"""(step, value)."""

# --- the run -----------------------------------------------------------------------------------


def record(
    out: Out,
    params: dict[str, Any],
    metrics: dict[str, float],
    files: Sequence[Path],
    curves: Mapping[str, Curve] | None = None,
) -> str:
    """Write a run to ``MLFLOW_TRACKING_URI``, or to ``OUT/mlflow.db``.

    Returns
    -------
    str
        Where it was written, or why it wasn't: a sentence to show.
    """
    if not is_installed():
        return "not recorded: MLflow isn't installed (pip install 'pomona[mlflow]')"
    uri = store_of(out)
    try:
        with connected(uri) as client:
            run_id = new_run(client, out, params, metrics, files, curves)
    except Exception as error:  # a run that is done is not lost to its book-keeping
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
    curves: Mapping[str, Curve] | None = None,
) -> str:
    """Write a run, note it in the manifest, and return its id.

    Files and folders lie in the run where they lie in OUT; what doesn't exist is left out.
    """
    from mlflow.entities import Metric, Param

    run_id = str(client.create_run(_experiment(client, out), run_name=out.root.name).info.run_id)
    status = "FAILED"
    try:
        now = int(time.time() * 1000)
        client.log_batch(
            run_id,
            [
                *(Metric(name, value, now, 0) for name, value in metrics.items()),
                *(
                    Metric(f"curve_{name}", value, now, step)
                    for name, curve in (curves or {}).items()
                    for step, value in curve
                ),
            ],
            [Param(name, str(value)) for name, value in params.items()],
        )
        for path in files:
            if path.is_dir():
                client.log_artifacts(run_id, str(path), path.name)
            elif path.exists():
                client.log_artifact(run_id, str(path), _folder(out, path))
        status = "FINISHED"
    finally:
        client.set_terminated(run_id, status)
    about = {"store": without_password(store_of(out)), "run": run_id, "model": model_digest(out)}
    layout.update(out, STAGE, about)
    return run_id


def _folder(out: Out, path: Path) -> str | None:
    inside = path.parent.relative_to(out.root).as_posix() if path.is_relative_to(out.root) else "."
    return None if inside == "." else inside


def _experiment(client: Any, out: Out) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "pomona")
    if (found := client.get_experiment_by_name(name)) is not None:
        return str(found.experiment_id)
    # Beside the database, which several OUTs may share; MLflow would take the working directory.
    local = re.fullmatch(r"sqlite:///(.+)", store_of(out))
    place = Path(local[1]).resolve().parent / "mlflow-artifacts" if local else None
    return str(client.create_experiment(name, artifact_location=place and place.as_uri()))


def recorded_run(client: Any, out: Out) -> str | None:
    """Return the id of the run of this very model in this store, if there is one."""
    from mlflow.exceptions import MlflowException

    about = read_json(out.manifest).get("stages", {}).get(STAGE, {})
    wanted = {"store": without_password(store_of(out)), "model": model_digest(out)}
    if {name: about.get(name) for name in wanted} != wanted:
        return None
    try:
        found = client.get_run(about["run"]).info
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return str(found.run_id) if found.lifecycle_stage == "active" else None


def model_digest(out: Out) -> str | None:
    """Return the digest that stands in ``OUT/model/model.json``; None where there is no model."""
    try:
        return str(json.loads((out.model / "model.json").read_bytes())["digest"])
    except (OSError, ValueError, KeyError):
        return None
