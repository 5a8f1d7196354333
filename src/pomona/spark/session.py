"""The Spark session: Java, start, settings, end, and the one line that says why Spark failed."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
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

TRIES = 4
"""Of a task, as on a cluster (spark.task.maxFailures)."""


# --- the session -------------------------------------------------------------------------------


def check_java() -> None:
    """Raise MissingError, with the command that installs it, if Java 17 or newer isn't there."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin") if home else shutil.which("java")
    told = ""
    if java:
        with contextlib.suppress(OSError):
            told = subprocess.run(
                [java, "-version"], capture_output=True, text=True, check=False
            ).stderr
    found = re.search(r'version "(?:1\.)?(\d+)', told)
    if not found or int(found[1]) < JAVA_NEEDED:
        what = f"Java {found[1]} was found" if found else "no Java was found"
        raise MissingError(f"Spark needs Java {JAVA_NEEDED} or newer, and {what}. {JAVA_REMEDY}")


@dataclass(frozen=True)
class Cluster:
    """Where Spark runs.

    Attributes
    ----------
    master
        As Spark writes it, or ``sc://HOST:PORT`` of a Spark Connect server; used only when no
        session is active.
    conf
        Further settings of Spark.
    log_file
        Takes what the JVM and the workers print.
    """

    master: str = "local[*]"
    conf: tuple[tuple[str, str], ...] = ()
    log_file: Path | None = None


def active_session() -> SparkSession | None:
    """Return the user's session, also where another thread made it: to the JVM it isn't active."""
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is not None:
        return active
    made = getattr(SparkSession, "_instantiatedSession", None)
    return made if made is not None and made.sparkContext._jsc is not None else None


@contextlib.contextmanager
def session(cluster: Cluster) -> Iterator[SparkSession]:
    """Give the active Spark session, left running afterwards, or one of our own, stopped then."""
    from pyspark.sql import SparkSession

    active = active_session()
    if active is not None:
        yield active
        return
    if connect.is_server(cluster.master):
        connect.check_server(cluster.master)
        builder = SparkSession.builder.remote(cluster.master)
    else:
        check_java()
        if cluster.master.startswith("local"):
            # Without this, workers are whatever `python3` comes first on the PATH. On other
            # machines that is right: the driver's own path means nothing there.
            os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        # Local mode gives a task one try; a worker that dies shouldn't end a long run there either.
        master = re.sub(r"^local\[([^,\]]+)\]$", rf"local[\1,{TRIES}]", cluster.master)
        builder = SparkSession.builder.master(master)
    builder = builder.appName("pomona")
    for key, value in {**_defaults(cluster.master), **dict(cluster.conf)}.items():
        builder = builder.config(key, value)
    try:
        with _noise_to(cluster.log_file):
            spark = builder.getOrCreate()
    except Exception as error:
        log.exception("Spark did not start")
        where = f" ({cluster.log_file})" if cluster.log_file else ""
        master = connect.redacted(cluster.master)
        raise JobError(
            f"Spark did not start on {master}: {root_cause(error)}; see the log{where}"
        ) from error
    try:
        yield spark
    finally:
        with contextlib.suppress(Exception):  # the JVM may be gone already, and that is the wish
            spark.stop()
        with contextlib.suppress(Exception):
            _stop_gateway()


def adopt() -> None:
    """Make the session that spark-submit or a platform set up the active one, with its settings.

    `session` then takes it, whatever master the command line names.
    """
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    SparkSession.builder.appName("pomona").getOrCreate()


@contextlib.contextmanager
def lazy_session(cluster: Cluster) -> Iterator[Callable[[], SparkSession]]:
    """Give a function that starts the session when it is first called: a run may need none."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda: stack.enter_context(session(cluster)))


def _defaults(master: str) -> dict[str, str]:
    if connect.is_server(master):
        return {}  # the server has its own
    conf = {"spark.log.level": "WARN", "spark.ui.showConsoleProgress": "false"}
    if master.startswith("local"):
        # One machine: no name look-ups, no web server, and one thread in each worker's libraries.
        conf |= {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.ui.enabled": "false",
            "spark.executorEnv.OMP_NUM_THREADS": "1",
        }
    return conf


@contextlib.contextmanager
def _noise_to(log_file: Path | None) -> Iterator[None]:
    """Let the JVM, which is started in here, inherit the log file in place of our output."""
    if log_file is None:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with log_file.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def _stop_gateway() -> None:
    """End the JVM too: the next session, with other settings, must start its own."""
    from pyspark import SparkContext

    gateway = SparkContext._gateway
    if gateway is None:
        return
    gateway.shutdown()
    process = getattr(gateway, "proc", None)
    if process is not None:
        process.stdin.close()
        process.wait(timeout=10)
    SparkContext._gateway = None
    SparkContext._jvm = None


def root_cause(error: BaseException) -> str:
    """Return the one line of a Spark failure that says why."""
    text = str(error)
    python = [
        line
        for line in text.splitlines()
        if re.match(r"(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b", line.strip())
    ]
    causes = [line for line in text.splitlines() if line.startswith("Caused by:")]
    java = [line[2:] for line in text.splitlines() if line.startswith(": ")]  # Py4J's second line
    lines = python or causes or java or text.splitlines() or [type(error).__name__]
    return lines[-1 if python else 0].strip()[:300]
