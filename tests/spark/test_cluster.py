"""A Spark cluster of real processes gives the same table as one machine, whatever fails in it.

Master and workers are those of the pip package. Executors have the dependencies without Pomona, and
a working folder, home and cache of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from pomona.pipeline.extract import ExtractOptions
from pomona.pipeline.reduce import ReduceOptions
from pomona.pipeline.run import run
from pomona.pipeline.train import TrainOptions
from tests import bad_decoder
from tests.cluster import MEMORY, SHORT_TIMEOUTS, Cluster, cluster, hiding, python_without_pomona
from tests.conftest import fill

OPTIONS = ["--weights", "fruits", "--image-size", "64", "--device", "cpu", "--json"]
PHOTOS = 3 * 2 * 100

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's processes"),
]

SECONDS = 600
"""No test waits longer for an event; far more than a busy machine needs."""

_started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """A driver that is left running holds the cluster's cores, which the next test waits for."""
    yield
    while _started:
        process = _started.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("photos") / "source", each=100)


@pytest.fixture(scope="module")
def whole(spark: Any, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run on one machine leaves, in the session that tests share."""
    out = tmp_path_factory.mktemp("whole") / "out"
    options = ExtractOptions(weights="fruits", image_size=64, device="cpu")
    few = ReduceOptions(plots=False)
    return {**run(source, out, options, few, train_options=TrainOptions()), "out": out}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return python_without_pomona(tmp_path_factory.mktemp("python") / "venv")


@pytest.fixture(scope="module")
def two(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster"), python) as started:
        for name in ("first", "second"):
            started.start_worker(name)
        yield started


def start(
    source: Path | str,
    out: Path,
    where: Cluster | str | None,
    command: str = "extract",
    more: tuple[str, ...] = (),
    before: tuple[str, ...] = (),
) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "pomona", command, str(source), "--out", str(out), *OPTIONS]
    environment = dict(os.environ)
    if isinstance(where, Cluster):
        environment["PYSPARK_PYTHON"] = str(where.python)
        for key, value in where.conf.items():
            words += ["--spark-conf", f"{key}={value}"]
        words += ["--spark-conf", f"spark.driver.host={where.host}", "--master", where.url]
    elif where:
        words += ["--master", where]
    return popen([*before, *words, *more], environment)


def popen(words: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    _started.append(process)
    return process


def done(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    records: dict[str, Any] = json.loads(output)
    return records


def rows(out: Path) -> dict[str, Any]:
    files = sorted((out / "features").glob("split=*/*.parquet"))
    every = [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]
    by_path = {row["path"]: row for row in every}
    assert len(by_path) == len(every), "nothing twice"
    return by_path


def wait_for_parts(out: Path, process: subprocess.Popen[str], count: int = 1) -> None:
    end = time.monotonic() + SECONDS
    while len(list(out.glob("_work/parts-*/*.parquet"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def digest(record: dict[str, Any]) -> str:
    return str(record["extract"]["digests"]["features"])


# --- the same table ----------------------------------------------------------------------------


def test_the_whole_run_is_the_same(
    source: Path, whole: dict[str, Any], two: Cluster, tmp_path: Path
) -> None:
    there = done(start(source, tmp_path / "out", two, "run", ("--no-plots", "--no-mlflow")))
    for stage in ("extract", "reduce", "train"):
        assert there[stage]["digests"] == whole[stage]["digests"]
    assert all(two.executors(name) == [] for name in ("first", "second")), "the run lets go"
    # An executor looked nothing up in a cache of its own, and kept nothing there.
    assert not list(two.root.glob("*/cache/*"))


@pytest.fixture(scope="module")
def apart(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Path]]:
    """A cluster that doesn't see one folder of the driver's."""
    folder = tmp_path_factory.mktemp("drivers")
    words = hiding(folder)
    with cluster(tmp_path_factory.mktemp("apart"), python) as started:
        started.start_worker("alone", before=words)
        yield started, folder


def test_executors_need_not_see_out(
    source: Path, whole: dict[str, Any], apart: tuple[Cluster, Path]
) -> None:
    workers, folder = apart
    out = folder / "out"
    process = start(source, out, workers)
    wait_for_parts(out, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    record = done(start(source, out, workers))
    assert 0 < record["extract"]["times"]["computed"] < PHOTOS, "what came back is kept"
    assert digest(record) == digest(whole)
    assert "don't see" in (out / "pomona.log").read_text()


def test_executors_must_see_the_source(apart: tuple[Cluster, Path]) -> None:
    workers, folder = apart
    process = start(fill(folder / "source", 2, 2), folder / "other", workers)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    assert "the executors can't read" in errors.splitlines()[-1]
    assert "driver and executors both see" in errors.splitlines()[-1]


def test_executors_without_the_dependencies(two: Cluster, source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    poor = Cluster(two.root, bare / "bin" / "python", two.host, two.port)
    _, errors = (process := start(source, tmp_path / "out", poor)).communicate(timeout=SECONDS)
    assert process.returncode == 2
    assert "the executors can't run Pomona" in errors.splitlines()[-1]
    assert "No module named" in errors.splitlines()[-1]


# --- faults ------------------------------------------------------------------------------------


def test_processes_are_killed(
    source: Path, whole: dict[str, Any], two: Cluster, tmp_path: Path
) -> None:
    """A Python worker, then an executor, then a worker host, each while the same job runs."""
    out = tmp_path / "out"
    process = start(source, out, two)
    for number, find in enumerate((two.python_workers, two.executors)):
        wait_for_parts(out, process, 1 + 2 * number)
        victims: list[psutil.Process] = []
        while not victims:
            assert process.poll() is None, process.communicate()
            victims = find("second") or find("first")
            time.sleep(0.02)
        victims[0].kill()
    wait_for_parts(out, process, 5)
    two.stop("second")
    record = done(process)
    two.start_worker("second")
    assert digest(record) == digest(whole)
    assert len(rows(out)) == PHOTOS
    assert not (out / "_work").exists()


def test_the_driver_is_killed(
    source: Path, whole: dict[str, Any], two: Cluster, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(source, out, two)
    wait_for_parts(out, process, 2)
    process.kill()
    process.communicate()
    record = done(start(source, out, two))
    assert 0 < record["extract"]["times"]["computed"] < PHOTOS
    assert digest(record) == digest(whole)


IN_A_SESSION = """
import json, sys
from pyspark.sql import SparkSession
from pomona.pipeline.extract import ExtractOptions, extract

spark = SparkSession.builder.master("local[2]").getOrCreate()  # a task has one attempt
options = ExtractOptions(weights="fruits", image_size=64, device="cpu")
print(json.dumps({"extract": extract(sys.argv[1], sys.argv[2], options)}))
assert spark.range(3).count() == 3, "the session is left running"
"""


@pytest.mark.parametrize("where", ["a cluster", "a session of the user's"])
def test_a_photo_that_ends_or_stalls_its_worker(
    where: str, source: Path, whole: dict[str, Any], tmp_path: Path, request: Any
) -> None:
    photos = tmp_path / "source"
    shutil.copytree(source, photos)
    bad_decoder.add_photos(photos)
    out = tmp_path / "out"
    setting = bad_decoder.install(tmp_path / "bad")
    if where == "a cluster":
        setting["PYTHONPATH"] = str(tmp_path / "bad")  # Pomona itself is sent
        more = [
            w for k, v in setting.items() for w in ("--spark-conf", f"spark.executorEnv.{k}={v}")
        ]
        two = request.getfixturevalue("two")
        more += ["--max-error-rate", "0.01", "--components", "5", "--no-mlflow"]
        process = start(photos, out, two, "run", more=tuple(more))
    else:
        words = [sys.executable, "-c", IN_A_SESSION, str(photos), str(out)]
        process = popen(words, os.environ | setting)
    record = done(process)
    assert record["extract"]["rejected"] == {"crashed": 2}
    there = rows(out)
    assert len(there) == PHOTOS + 2
    assert {Path(p).stem for p, row in there.items() if row["error"]} == {"crashes", "hangs"}
    if where == "a cluster":
        assert "crashes.jpg" in (out / "report" / "report.html").read_text(encoding="utf-8")
    # The others are what they are without such photos, to the bit.
    for path, row in rows(whole["out"]).items():
        assert there[path]["features"] == row["features"]


def test_the_disk_is_full(source: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=10500k", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk needs root and mount")
    try:
        out = disk / "out"
        process = start(source, out, None)
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 1, errors
        assert "No space left" in errors.splitlines()[-1]
        assert "Traceback" not in errors
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        record = done(start(source, out, None))
        assert record["extract"]["times"]["computed"] < PHOTOS
        assert digest(record) == digest(whole)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)


# --- GPUs --------------------------------------------------------------------------------------

WHICH = """
import time
from pomona.backbone.spec import BackboneSpec
from pomona.spark.tasks import at_task

def which(number):
    spec = at_task(BackboneSpec("x", "x", device="cuda"))
    time.sleep(2)  # so that both slots are in use
    return {"gpu": spec.gpu, "guard": spec.guard}
"""

ASK = """
import json, sys
from which import which
from pomona.backbone.spec import BackboneSpec, make_spec
from pomona.backbone.weights import load_weights
from pomona.spark import executors
from pomona.spark.resources import fit_spec, gives_gpus, gpus_elsewhere
from pomona.spark.session import Cluster, session
from pomona.spark.tasks import run_tasks

conf = json.loads(sys.argv[2])
cluster = Cluster(sys.argv[1], tuple(conf.items()))
gives = gives_gpus(cluster)
with session(cluster) as spark:
    executors.ship(spark)
    spark.addArtifacts(sys.argv[3], pyfile=True)
    share = fit_spec(BackboneSpec("x", "x", device="cuda"), spark).memory_share
    elsewhere = gpus_elsewhere(cluster, "auto")
    device = make_spec(load_weights("fruits"), image_size=64, elsewhere=elsewhere).device
    tasks = run_tasks(spark, which, 4)
print(json.dumps({"gives": gives, "share": share, "device": device, "tasks": tasks}))
"""


def test_tasks_use_the_gpus_that_spark_gives_them(python: Path, tmp_path: Path) -> None:
    """By configuration: the discovery script names GPUs that don't exist."""
    script = tmp_path / "discover.sh"
    script.write_text("""echo '{"name": "gpu", "addresses": ["2", "5"]}'\n""")
    script.chmod(0o755)
    (tmp_path / "which.py").write_text(WHICH)
    (tmp_path / "ask.py").write_text(ASK)
    with cluster(tmp_path / "c", python) as started:
        prefix = "-Dspark.worker.resource.gpu."
        has = f"{prefix}amount=2 {prefix}discoveryScript={script}"
        started.start_worker("gpus", cores=2, java=has)
        conf = MEMORY | {
            "spark.driver.host": started.host,
            "spark.executor.resource.gpu.amount": "2",
            "spark.task.resource.gpu.amount": "1",
        }
        words = [sys.executable, str(tmp_path / "ask.py"), started.url, json.dumps(conf)]
        asked = subprocess.run(
            [*words, str(tmp_path / "which.py")],
            env=os.environ | {"PYSPARK_PYTHON": str(python)},
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout.splitlines()[-1])
    assert answer["gives"]
    assert answer["share"] == 0.9
    assert answer["device"] == "cuda", "whatever the driver has"
    assert {task["gpu"] for task in answer["tasks"]} == {2, 5}
    assert {task["guard"] for task in answer["tasks"]} == {"watch"}


# --- hosts -------------------------------------------------------------------------------------


class Net:
    """Another host: a network namespace behind a virtual cable that can be cut."""

    here, there = "10.213.77.1", "10.213.77.2"

    def __init__(self) -> None:
        self.name = f"pomona{os.getpid()}"
        self.near, self.far = f"pn{os.getpid()}", f"pf{os.getpid()}"
        if os.geteuid() != 0 or shutil.which("ip") is None:
            pytest.skip("hosts of their own need root and ip")
        if self._ip("netns", "add", self.name, check=False):
            pytest.skip("network namespaces can't be made here")
        self._ip("link", "add", self.near, "type", "veth", "peer", "name", self.far)
        self._ip("link", "set", self.far, "netns", self.name)
        self._ip("addr", "add", f"{self.here}/30", "dev", self.near)
        self._ip("link", "set", self.near, "up")
        self._inside("addr", "add", f"{self.there}/30", "dev", self.far)
        self._inside("link", "set", "lo", "up")
        self.cable("up")

    @property
    def before(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)

    def cable(self, state: str) -> None:
        self._inside("link", "set", self.far, state)

    def close(self) -> None:
        self._ip("link", "del", self.near, check=False)
        self._ip("netns", "del", self.name, check=False)

    def _inside(self, *words: str) -> None:
        self._ip("-n", self.name, *words)

    def _ip(self, *words: str, check: bool = True) -> int:
        return subprocess.run(["ip", *words], check=check, capture_output=True).returncode


def test_a_host_is_cut_off_and_comes_back(
    source: Path, whole: dict[str, Any], python: Path, tmp_path: Path
) -> None:
    with (
        contextlib.closing(Net()) as net,
        cluster(tmp_path / "c", python, net.here, MEMORY | SHORT_TIMEOUTS) as hosts,
    ):
        hosts.start_worker("near", net.here, {"SPARK_LOCAL_IP": net.here})
        hosts.start_worker("far", net.there, {"SPARK_LOCAL_IP": net.there}, net.before)
        out = tmp_path / "out"
        process = start(source, out, hosts, before=("env", f"SPARK_LOCAL_IP={net.here}"))
        wait_for_parts(out, process)
        net.cable("down")
        hosts.wait_for(lambda: "Removing worker" in hosts.log("master"), "the master sees it")
        net.cable("up")
        record = done(process)
        assert digest(record) == digest(whole)
        assert len(rows(out)) == PHOTOS
        line = "Registering worker"
        hosts.wait_for(lambda: hosts.log("master").count(line) >= 3, "the host comes back")
        assert digest(done(start(source, out, hosts))) == digest(whole)
