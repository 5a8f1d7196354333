"""Task slots, CPU threads and GPUs of a Spark session."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from pomona.backbone.spec import BackboneSpec
from pomona.core.cpus import available_cpus
from pomona.engine.engine import GPU_WORKERS
from pomona.spark.session import ALL_CORES, Cluster, active_session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

GPU_AMOUNT = "spark.task.resource.gpu.amount"
"""Spark's setting for the GPUs of a task: a count, or a share of one GPU."""
SLOTS_UNKNOWN = 16
"""Assumed slots of a Spark Connect server that doesn't tell, and assumed executors of a cluster
that grows on demand. Too many tasks do no harm: they wait in Spark's queue."""


def _setting(spark: SparkSession, key: str, default: int) -> int:
    return int(spark.conf.get(key, str(default)) or default)


def slots(spark: SparkSession) -> int:
    """Return how many tasks run at once."""
    cpus = _setting(spark, "spark.task.cpus", 1)
    local = re.fullmatch(r"local\[(\d+|\*)(?:,\s*\d+)?\]", spark.conf.get("spark.master", "") or "")
    if local:
        threads = available_cpus() if local[1] == "*" else int(local[1])
        return max(1, threads // cpus)
    cores = _setting(spark, "spark.executor.cores", 1)
    if (spark.conf.get("spark.dynamicAllocation.enabled", "") or "") == "true":
        most = _setting(spark, "spark.dynamicAllocation.maxExecutors", SLOTS_UNKNOWN)
        return max(1, min(most, SLOTS_UNKNOWN) * cores // cpus)
    with contextlib.suppress(Exception):  # Spark Connect has no SparkContext
        return max(1, int(spark.sparkContext.defaultParallelism) // cpus)
    executors = _setting(spark, "spark.executor.instances", 0)
    return max(1, executors * cores // cpus) if executors else SLOTS_UNKNOWN


def fit_spec(spec: BackboneSpec, spark: SparkSession) -> BackboneSpec:
    """Return the spec with the threads and the share of GPU memory of one task slot.

    On a CPU a worker has as many threads as its slot has CPUs. On a GPU each worker decodes with
    its share of the machine's cores.
    """
    cpus = _setting(spark, "spark.task.cpus", 1)
    if spec.device == "cpu":
        return replace(spec, threads=cpus)
    if amount := float(spark.conf.get(GPU_AMOUNT, "0") or 0):
        # Spark assigns the GPUs: 1 / amount tasks share one.
        return replace(spec, threads=max(2, cpus), memory_share=0.9 * min(1.0, amount))
    if (spark.conf.get("spark.master", "") or "").startswith("local"):
        cores, workers = available_cpus(), slots(spark)
    else:  # the cores of one executor; the driver's machine may have more or fewer
        cores = _setting(spark, "spark.executor.cores", cpus)
        workers = max(1, cores // cpus)
    return replace(spec, threads=max(2, cores // workers), memory_share=0.9 / workers)


def gives_gpus(cluster: Cluster | None = None) -> bool:
    """Tell whether Spark's settings give GPUs to tasks; the driver itself may have none."""
    active = active_session()
    conf = active.conf if active is not None else dict(cluster.conf if cluster else ())
    return float(conf.get(GPU_AMOUNT, "0") or 0) > 0


def gpus_elsewhere(cluster: Cluster, device: str) -> bool:
    """Tell whether workers on other machines have GPUs, so that the driver's say nothing.

    A cluster whose settings don't tell (a Spark Connect server before there is a session) is
    trusted to have them if ``device`` is ``cuda``.
    """
    is_local = (cluster.master or ALL_CORES).startswith("local")
    return device != "cpu" and (gives_gpus(cluster) or (device == "cuda" and not is_local))


def local_master(master: str | None, device: str) -> str:
    """Return the master with as many slots as a GPU serves, in place of all cores."""
    if device != "cpu" and master in (None, ALL_CORES):
        return f"local[{min(GPU_WORKERS, available_cpus())}]"
    return master or ALL_CORES
