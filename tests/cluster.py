"""A Spark standalone cluster of real processes, for the tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

SPARK_CLASS = Path(sysconfig.get_paths()["purelib"], "pyspark", "bin", "spark-class")
MEMORY = {
    "spark.executor.memory": "600m",
    "spark.driver.memory": "600m",
    "spark.executor.memoryOverhead": "0",
}
SHORT_TIMEOUTS = {
    # A host that is cut off is noticed within seconds, not minutes. (A process that dies is noticed
    # at once.) On a busy machine a living executor may miss such a deadline too.
    "spark.network.timeout": "15s",
    "spark.network.timeoutInterval": "5s",
    "spark.executor.heartbeatInterval": "2s",
    "spark.worker.timeout": "10",
}


def free_port(host: str) -> int:
    with socket.socket() as some:
        some.bind((host, 0))
        return int(some.getsockname()[1])


def python_without_pomona(folder: Path) -> Path:
    """Make an interpreter with Pomona's dependencies and without Pomona, as executors have it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    site_packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # A line of a .pth file adds a folder, but not what that folder's own .pth files (editable
    # installs) would add.
    Path(site_packages, "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('pomona') is None)"
    words = [str(python), "-c", find]
    if subprocess.run(words, env=environment, check=False, cwd=folder).returncode == 0:
        pytest.skip("Pomona is installed beside its dependencies, not editable")
    return python


@dataclass
class Cluster:
    """Master and workers, each with a folder, a home and a cache of its own."""

    root: Path
    python: Path
    host: str = "127.0.0.1"
    port: int = 0
    conf: dict[str, str] = field(default_factory=lambda: MEMORY)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"spark://{self.host}:{self.port}"

    def environment(self, name: str, extra: dict[str, str]) -> dict[str, str]:
        folder = self.root / name
        for part in ("home", "cache", "work", "tmp"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        removed = ("PYTHONPATH", "PYSPARK_PYTHON", "POMONA_WEIGHTS")
        java = " ".join(f"-D{key}={value}" for key, value in self.conf.items() if "worker" in key)
        return {
            **{key: value for key, value in os.environ.items() if key not in removed},
            "HOME": str(folder / "home"),
            "POMONA_CACHE": str(folder / "cache"),
            "TMPDIR": str(folder / "tmp"),
            "SPARK_MASTER_OPTS": java,
            "SPARK_DAEMON_MEMORY": "256m",
            "SPARK_LOCAL_DIRS": str(folder / "tmp"),
            **extra,
        }

    def start(
        self,
        name: str,
        words: Sequence[str],
        extra: dict[str, str] | None = None,
        before: Sequence[str] = (),
        java: str = "",
    ) -> None:
        environment = self.environment(name, extra or {})
        environment["SPARK_WORKER_OPTS"] = f"{environment['SPARK_MASTER_OPTS']} {java}"
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*before, str(SPARK_CLASS), *words],
                cwd=self.root / name,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text(errors="replace")

    def wait_for(self, done: Callable[[], bool], what: str, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not done():
            logs = "".join(f"\n--- {n}\n{self.log(n)[-2000:]}" for n in self.processes)
            assert time.monotonic() < end, what + logs
            time.sleep(0.2)

    def start_master(self) -> None:
        self.port = free_port(self.host)
        words = ["org.apache.spark.deploy.master.Master", "--host", self.host]
        self.start("master", [*words, "--port", str(self.port), "--webui-port", "0"])
        self.wait_for(lambda: "I have been elected leader" in self.log("master"), "no master")

    def start_worker(
        self,
        name: str,
        host: str = "127.0.0.1",
        extra: dict[str, str] | None = None,
        before: Sequence[str] = (),
        cores: int = 1,
        java: str = "",
    ) -> None:
        words = ["org.apache.spark.deploy.worker.Worker", "--host", host, "--webui-port", "0"]
        words += ["--cores", str(cores), "--memory", "1g"]
        words += ["--work-dir", str(self.root / name / "work")]
        before_start = self.registrations(name)
        self.start(name, [*words, self.url], extra, before, java)
        self.wait_for(lambda: self.registrations(name) > before_start, f"no {name}")

    def registrations(self, name: str) -> int:
        """How often a worker has registered with the master."""
        exists = (self.root / f"{name}.log").exists()
        return self.log(name).count("Successfully registered with master") if exists else 0

    def executors(self, name: str) -> list[psutil.Process]:
        """The executors' JVMs of a worker."""
        return [p for p in self._below(name) if "CoarseGrained" in " ".join(cmdline(p))]

    def python_workers(self, name: str) -> list[psutil.Process]:
        """Spark's Python workers of a worker's executors: children of the daemon."""
        daemons = [p for p in self._below(name) if "pyspark.daemon" in " ".join(cmdline(p))]
        return [p for p in daemons if not p.children() and p.parent() in daemons]

    def _below(self, name: str) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return list(psutil.Process(self.processes[name].pid).children(recursive=True))
        return []

    def stop(self, name: str, number: int = signal.SIGKILL) -> None:
        process = self.processes.pop(name)
        below = []
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        for child in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait(timeout=30)

    def close(self) -> None:
        for name in list(self.processes):
            self.stop(name)


def cmdline(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return list(process.cmdline())
    return []


def hiding(folder: Path) -> tuple[str, ...]:
    """Words that start a command in a mount namespace where a folder is empty, as elsewhere."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("hiding a folder from a process needs root and unshare")
    script = f'mount --make-rprivate / && mount -t tmpfs none "{folder}" && exec "$@"'
    return ("unshare", "--mount", "sh", "-c", script, "sh")


@contextlib.contextmanager
def cluster(
    root: Path, python: Path, host: str = "127.0.0.1", conf: dict[str, str] = MEMORY
) -> Iterator[Cluster]:
    """A cluster with a master; the test starts workers."""
    if shutil.which("java") is None:
        pytest.skip("there is no Java")
    started = Cluster(root, python, host, conf=conf)
    try:
        started.start_master()
        yield started
    finally:
        started.close()
