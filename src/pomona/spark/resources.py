"""Task slots, CPU threads and GPUs of a Spark session."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from pomona.backbone.spec import BackboneSpec
from pomona.core.cpus import available_cpus
from pomona.spark.session import Cluster, active_session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def _task_cpus(spark: SparkSession) -> int:
    return int(spark.conf.get("spark.task.cpus", "1") or 1)


SLOTS_UNKNOWN = 16
"""Of a server's cluster that doesn't tell its size, and executors of one that grows on demand: too
many tasks only wait in Spark's queue."""


def slots(spark: SparkSession) -> int:
    """Return how many tasks run at once."""
    cpus = _task_cpus(spark)
    local = re.fullmatch(r"local\[(\d+|\*)(?:,\s*\d+)?\]", spark.conf.get("spark.master", "") or "")
    if local:
        threads = available_cpus() if local[1] == "*" else int(local[1])
        return max(1, threads // cpus)
    if (spark.conf.get("spark.dynamicAllocation.enabled", "") or "") == "true":
        most = int(spark.conf.get("spark.dynamicAllocation.maxExecutors", "") or SLOTS_UNKNOWN)
        cores = int(spark.conf.get("spark.executor.cores", "1") or 1)
        return max(1, min(most, SLOTS_UNKNOWN) * cores // cpus)
    with contextlib.suppress(Exception):  # Spark Connect has no SparkContext
        return max(1, int(spark.sparkContext.defaultParallelism) // cpus)
    executors = int(spark.conf.get("spark.executor.instances", "0") or 0)
    cores = int(spark.conf.get("spark.executor.cores", "1") or 1)
    return max(1, executors * cores // cpus) if executors else SLOTS_UNKNOWN


def fit_spec(spec: BackboneSpec, spark: SparkSession) -> BackboneSpec:
    """Fit threads and GPU memory to a task slot.

    On a CPU a worker has as many threads as its slot has CPUs, so that none are too many. On a GPU
    each worker decodes with its share of the machine's cores.
    """
    cpus = _task_cpus(spark)
    if spec.device == "cpu":
        return replace(spec, threads=cpus)
    if amount := float(spark.conf.get(GPU_AMOUNT, "0") or 0):
        # Spark hands out the GPUs: so many tasks share one.
        return replace(spec, threads=max(2, cpus), memory_share=0.9 * min(1.0, amount))
    local = (spark.conf.get("spark.master", "") or "").startswith("local")
    workers = slots(spark)
    cores = available_cpus()
    if not local:
        # On a cluster what counts is what one executor has; the driver's cores say nothing.
        cores = int(spark.conf.get("spark.executor.cores", str(cpus)) or cpus)
        workers = max(1, cores // cpus)
    return replace(spec, threads=max(2, cores // workers), memory_share=0.9 / workers)


GPU_AMOUNT = "spark.task.resource.gpu.amount"
"""Spark's setting for the GPUs of a task: a number, or the share of one."""


def gives_gpus(cluster: Cluster | None = None) -> bool:
    """Tell whether Spark gives GPUs to tasks, by its settings: the driver needn't have one."""
    active = active_session()
    if active is not None:
        return float(active.conf.get(GPU_AMOUNT, "0") or 0) > 0
    return cluster is not None and float(dict(cluster.conf).get(GPU_AMOUNT, "0") or 0) > 0


def gpus_elsewhere(cluster: Cluster, device: str) -> bool:
    """Tell whether the workers have the GPUs, so that what this machine has says nothing.

    Of a cluster that doesn't tell (a Spark Connect server before there is a session), ``cuda`` is
    taken for an answer.
    """
    here = cluster.master.startswith("local")
    return device != "cpu" and (gives_gpus(cluster) or (device == "cuda" and not here))


GPU_WORKERS = 2
"""Workers for one GPU in local mode: one computes while the other decodes. Each has a CUDA context,
so there isn't one for each core."""


def local_master(master: str, device: str) -> str:
    """Return the master with as many slots as a GPU serves, not all cores."""
    if device != "cpu" and master == "local[*]":
        return f"local[{min(GPU_WORKERS, available_cpus())}]"
    return master
