"""Which engine runs a stage: Spark where it is asked for or there, processes otherwise."""

from __future__ import annotations

import contextlib

from pomona.engine.engine import Engine
from pomona.engine.processes import Processes
from pomona.spark.engine import SparkEngine
from pomona.spark.session import Cluster, active_session


def wants_spark(cluster: Cluster) -> bool:
    """Tell whether Spark runs the tasks: a master is named, or a session is active."""
    return cluster.master is not None or active_session() is not None


def open_engine(
    cluster: Cluster,
    device: str = "cpu",
    *,
    needs_spark: bool = False,
    keep: contextlib.ExitStack | None = None,
) -> contextlib.AbstractContextManager[Engine]:
    """Return the engine for tasks on a device (``cpu``, ``cuda``); it starts when it is needed.

    With ``needs_spark`` it is Spark's, for what only Spark reads. A Spark session that is started
    stays until ``keep`` is closed.
    """
    if needs_spark or wants_spark(cluster):
        return SparkEngine(cluster, device, keep)
    return Processes(cluster.workers, cluster.log_file, device)
