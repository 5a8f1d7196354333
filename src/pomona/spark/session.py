"""The Spark session: check Java, start, settings, stop, and why Spark failed, in one line."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pomona.core.errors import JobError, MissingError
from pomona.spark import connect

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger("pomona")

JAVA_NEEDED = 17
JAVA_REMEDY = (
    "Debian/Ubuntu: sudo apt-get install openjdk-17-jre-headless; macOS: brew install openjdk@17; "
    "Windows: winget install EclipseAdoptium.Temurin.17.JRE"
)

TASK_ATTEMPTS = 4
"""Attempts of a task, as on a cluster (spark.task.maxFailures)."""


ALL_CORES = "local[*]"
"""The master where none is named."""


def check_pyspark() -> None:
    """Raise MissingError, with the remedy, if PySpark isn't installed."""
    if importlib.util.find_spec("pyspark") is None:
        raise MissingError(
            "this needs Spark: pip install 'pomona[spark]', and Java 17; on one machine folders, "
            "s3:// and gs:// need neither"
        )


def check_java() -> None:
    """Raise MissingError, with the command that installs Java 17, if no such Java is found."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin") if home else shutil.which("java")
    output = ""
    if java:
        with contextlib.suppress(OSError):
            output = subprocess.run(
                [java, "-version"], capture_output=True, text=True, check=False
            ).stderr
    version = re.search(r'version "(?:1\.)?(\d+)', output)
    if not version or int(version[1]) < JAVA_NEEDED:
        what = f"Java {version[1]} was found" if version else "no Java was found"
        raise MissingError(f"Spark needs Java {JAVA_NEEDED} or newer, and {what}. {JAVA_REMEDY}")


@dataclass(frozen=True)
class Cluster:
    """Where tasks run.

    Attributes
    ----------
    master
        Spark's master URL, or ``sc://HOST:PORT`` of a Spark Connect server. Ignored if a session
        is active. None: without a session, stages run in processes of this machine, and what needs
        Spark starts it on all cores.
    conf
        Spark settings, which override Pomona's defaults.
    log_file
        Receives what the JVM and the workers print.
    workers
        Processes without Spark; by default one for each core, on a GPU two.
    """

    master: str | None = None
    conf: tuple[tuple[str, str], ...] = ()
    log_file: Path | None = None
    workers: int | None = None


def active_session() -> SparkSession | None:
    """Return the user's session, even if another thread made it and the JVM has none active."""
    if sys.modules.get("pyspark") is None:  # nobody can have made one
        return None
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is not None:
        return active
    latest = getattr(SparkSession, "_instantiatedSession", None)
    return latest if latest is not None and latest.sparkContext._jsc is not None else None


@contextlib.contextmanager
def session(cluster: Cluster) -> Iterator[SparkSession]:
    """Give the active Spark session, which stays, or start one, which is stopped afterwards.

    Raises MissingError if Java, or the client of Spark Connect, isn't installed, and JobError if
    Spark doesn't start.
    """
    active = active_session()
    if active is not None:
        yield active
        return
    builder = _builder(cluster)
    try:
        with _output_to(cluster.log_file):
            spark = builder.getOrCreate()
    except Exception as error:
        log.exception("Spark did not start")
        where = f" ({cluster.log_file})" if cluster.log_file else ""
        master = connect.redacted(cluster.master or ALL_CORES)
        raise JobError(
            f"Spark did not start on {master}: {root_cause(error)}; see the log{where}"
        ) from error
    try:
        yield spark
    finally:
        with contextlib.suppress(Exception):  # the JVM may have ended already
            spark.stop()
        with contextlib.suppress(Exception):
            _stop_gateway()


def _builder(cluster: Cluster) -> SparkSession.Builder:
    check_pyspark()
    from pyspark.sql import SparkSession

    master = cluster.master or ALL_CORES
    if connect.is_server(master):
        connect.check_server(master)
        builder = SparkSession.builder.remote(master)
    else:
        check_java()
        if master.startswith("local"):
            # Without this, workers run whatever `python3` comes first on the PATH. On a cluster
            # that is right: the driver's own path means nothing there.
            os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        # By default a task has one attempt in local mode, so that a dead worker ends a long run.
        master = re.sub(r"^local\[([^,\]]+)\]$", rf"local[\1,{TASK_ATTEMPTS}]", master)
        builder = SparkSession.builder.master(master)
    builder = builder.appName("pomona")
    for key, value in {**_defaults(master), **dict(cluster.conf)}.items():
        builder = builder.config(key, value)
    return builder


def adopt() -> None:
    """Make spark-submit's or a platform's session the active one, whatever ``--master`` says."""
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    SparkSession.builder.appName("pomona").getOrCreate()


def _defaults(master: str) -> dict[str, str]:
    if connect.is_server(master):
        return {}  # the server has settings of its own
    conf = {"spark.log.level": "WARN", "spark.ui.showConsoleProgress": "false"}
    if master.startswith("local"):
        # No name look-ups, no web server, and one thread in the libraries of each worker.
        conf |= {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.ui.enabled": "false",
            "spark.executorEnv.OMP_NUM_THREADS": "1",
        }
    return conf


@contextlib.contextmanager
def _output_to(log_file: Path | None) -> Iterator[None]:
    """Redirect stdout and stderr, which the JVM that is started meanwhile inherits."""
    if log_file is None:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with log_file.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def _stop_gateway() -> None:
    """End the JVM too: the next session may have other settings, and starts its own."""
    from pyspark import SparkContext

    gateway = SparkContext._gateway
    if gateway is None:
        return
    gateway.shutdown()
    if (process := getattr(gateway, "proc", None)) is not None:
        process.stdin.close()
        process.wait(timeout=10)
    SparkContext._gateway = SparkContext._jvm = None


def root_cause(error: BaseException) -> str:
    """Return the line of a Spark failure that says why: Python's last, or else Java's first."""
    lines = str(error).splitlines()
    exception = r"(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b"
    if python := [line for line in lines if re.match(exception, line.strip())]:
        return python[-1].strip()[:300]
    causes = [line for line in lines if line.startswith("Caused by:")]
    py4j = [line[2:] for line in lines if line.startswith(": ")]  # its second line names the error
    return (causes or py4j or lines or [type(error).__name__])[0].strip()[:300]
