"""MLflow: one run for one ``pomona run``. A server that doesn't answer never costs the run."""

from __future__ import annotations

import logging
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pomona.manifest import Out

log = logging.getLogger("pomona")


def record(
    out: Out, params: dict[str, Any], metrics: dict[str, float], artifacts: list[Path]
) -> str:
    """Write a run to ``MLFLOW_TRACKING_URI``, or to ``OUT/mlflow.db``.

    Returns
    -------
    str
        Where it was written, or why it wasn't: a sentence to show.
    """
    if find_spec("mlflow") is None:
        return "not recorded: MLflow isn't installed (pip install 'pomona[mlflow]')"
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{out.root / 'mlflow.db'}"
    # A server that is down must not hold the run up: MLflow's default is seven tries of 120 s.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    try:
        run_id = _write(uri, out, params, metrics, artifacts)
    except Exception as error:  # a run that is done is not lost to its book-keeping
        log.warning("MLflow failed", exc_info=error)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return _without_password(f"not recorded: MLflow at {uri} failed ({reason})")
    return _without_password(f"{uri}, run {run_id}")


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]+@", "//", text)


def _write(
    uri: str, out: Out, params: dict[str, Any], metrics: dict[str, float], artifacts: list[Path]
) -> str:
    from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic"):  # importing mlflow sets its own levels
        logging.getLogger(noisy).setLevel(logging.WARNING)
    client = MlflowClient(tracking_uri=uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "pomona")
    found = client.get_experiment_by_name(name)
    if found is not None:
        experiment = found.experiment_id
    else:
        local = uri.startswith("sqlite:")
        where = (out.root / "mlflow-artifacts").as_uri() if local else None
        experiment = client.create_experiment(name, artifact_location=where)
    run_id = str(client.create_run(experiment, run_name=out.root.name).info.run_id)
    status = "FAILED"
    try:
        for key, value in params.items():
            client.log_param(run_id, key, value)
        for key, number in metrics.items():
            client.log_metric(run_id, key, number)
        for path in artifacts:
            if path.exists():
                client.log_artifact(run_id, str(path))
        status = "FINISHED"
    finally:
        client.set_terminated(run_id, status)
    return run_id
