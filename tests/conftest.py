"""Photos, weights and a Spark session for the tests."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import shutil
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

SHARED = Path(__file__).resolve().parents[2] / "shared"
REAL_PHOTOS = SHARED / "data" / "fruits-360-3body.tar.gz"
REAL_WEIGHTS = SHARED / "weights" / "mobilenetv2-7.safetensors"
CANONICAL = SHARED / "data" / "canonical-features.json"


@pytest.fixture(autouse=True, scope="session")
def _no_surprises(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of the user's: no weights, no cache, no MLflow server."""
    for name in ("POMONA_WEIGHTS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.pop(name, None)
    os.environ["POMONA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["PYSPARK_PYTHON"] = sys.executable
    # The tests' JVMs live for seconds to minutes, too short for the optimising compiler (C2), whose
    # threads compete with the workers for two cores.
    java = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
    if (archive := Path(sys.prefix) / "spark.jsa").exists():  # tools/spark_archive.py
        # A JVM of another class path can't use it, and would say so on its standard output.
        java += f" -XX:SharedArchiveFile={archive} -Xlog:disable -Xlog:all=error:stderr"
    os.environ["JDK_JAVA_OPTIONS"] = java
    # BLAS threads wait for each other by spinning: on a busy machine that takes minutes. The limit
    # is for NumPy's BLAS, which is loaded; the variable for SciPy's and for child processes.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    with contextlib.suppress(ImportError):  # of the extra train
        import threadpoolctl

        threadpoolctl.threadpool_limits(1, "blas")
    # For moto's server, which takes any; Spark's workers inherit them when the session starts.
    os.environ["AWS_ACCESS_KEY_ID"] = os.environ["AWS_SECRET_ACCESS_KEY"] = "test"


@pytest.fixture(scope="session")
def workers() -> Iterator[Any]:
    """One pool of workers for all tests that need none of their own."""
    from pomona.engine.processes import Processes

    class Shared(Processes):
        def __exit__(self, *_: object) -> None:
            """Stay."""

    shared = Shared(2)
    yield shared
    Processes.__exit__(shared)


@pytest.fixture(autouse=True)
def _engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, workers: Any) -> None:
    """Stages run on Spark in tests that take the fixture ``spark``, and in those alone.

    The session stays active in a process of pytest whose later tests don't ask for it. Other tests
    share workers, but for those with the mark ``own_workers``.
    """
    if "spark" not in request.fixturenames:
        monkeypatch.setattr("pomona.pipeline.engines.active_session", lambda: None)
    if not request.node.get_closest_marker("own_workers"):
        monkeypatch.setattr("pomona.pipeline.engines.Processes", lambda *_: workers)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the files that take longest first, so that no process ends long after the others."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script of benchmarks/."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    return importlib.import_module(name)


@functools.lru_cache(maxsize=4096)
def photo(seed: int = 0, size: tuple[int, int] = (100, 100), kind: str = "JPEG") -> bytes:
    """A photo of coloured noise."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def fill(root: Path, labels: int = 3, each: int = 8) -> Path:
    """A small source: Training and Test, a few labels, a few photos each."""
    for split in ("Training", "Test"):
        for label in range(labels):
            folder = root / split / f"Fruit {label}"
            folder.mkdir(parents=True, exist_ok=True)
            for n in range(each):
                seed = 1000 * label + 10 * n + (split == "Test")
                (folder / f"{n}_100.jpg").write_bytes(photo(seed))
    return root


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return fill(tmp_path / "source")


@pytest.fixture(scope="session")
def features() -> Any:
    """Features of 36 photos by random weights, float32 [36, 1280], for `tests.small_model`."""
    from pomona.backbone import extract
    from tests.small_model import small_spec

    contents = [photo(1000 * (n % 3) + n) for n in range(36)]
    batch = pa.record_batch({"content": pa.array(contents, pa.binary())})
    rows = next(extract.extract(iter([batch]), small_spec()))
    return np.array(rows["features"].to_pylist(), np.float32)


@pytest.fixture(scope="session")
def small_model_once(features: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    from tests.small_model import save_small_model

    return save_small_model(tmp_path_factory.mktemp("small") / "model", features, "random:0")


@pytest.fixture
def small_model(small_model_once: Path, tmp_path: Path) -> Path:
    """A model's folder that a test may damage."""
    shutil.copytree(small_model_once, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One session for all tests that need none of their own; the stages find it active."""
    from pomona.spark.session import Cluster, session

    log = tmp_path_factory.mktemp("spark") / "spark.log"
    few = (("spark.sql.shuffle.partitions", "2"),)  # by default 200 tasks for every groupBy
    with session(Cluster("local[2]", few, log)) as active:
        yield active


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command in this process; returns (code, stdout, stderr)."""
    from pomona.cli.main import main

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pomona", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return call


@pytest.fixture(scope="session")
def real_weights() -> Path:
    if not REAL_WEIGHTS.exists():
        pytest.skip("the real weights are not here (shared/weights)")
    return REAL_WEIGHTS


@pytest.fixture(scope="session")
def real_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not REAL_PHOTOS.exists():
        pytest.skip("the real photos are not here (shared/data)")
    folder = tmp_path_factory.mktemp("real")
    with tarfile.open(REAL_PHOTOS) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


INSECURE = "--host-resolver-rules=MAP fruit.test 127.0.0.1"
"""A name for this machine that the browser takes for another one's: plain http isn't trusted."""


def browser_lacks(what: str) -> NoReturn:
    """Skip what needs a browser; where `.ci/run` found one, nothing else may be missing."""
    if os.environ.get("POMONA_BROWSER_TESTS") == "required":
        pytest.fail(f"{what}, and .ci/run requires the browser tests")
    pytest.skip(what, allow_module_level=True)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    try:
        api = importlib.import_module("playwright.sync_api")
    except ImportError:
        browser_lacks("no playwright here")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if not program:
        browser_lacks("no chromium here (Debian: apt-get install chromium)")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=program,
            args=[*flags, "--disable-component-update", "--disable-sync", INSECURE],
        )
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as launched:
        yield launched


@dataclass
class Brake:
    """Holds a service's model until it is let go, but for the photo that tries a model."""

    go: threading.Event = field(default_factory=threading.Event)
    begun: list[bytes] = field(default_factory=list)


@pytest.fixture
def brake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Brake]:
    pool = pytest.importorskip("pomona.serving.worker_pool", reason="needs the extra serve")
    held, run = Brake(), pool.Loaded.run

    def slow(self: Any, kind: Any, contents: Any) -> Any:
        if contents[0] != pool.sample():
            held.begun.extend(contents)
            assert held.go.wait(300)
        return run(self, kind, contents)

    monkeypatch.setattr(pool.Loaded, "run", slow)
    yield held
    held.go.set()


@pytest.fixture(scope="session")
def store() -> Iterator[str]:
    """A server that speaks S3; returns the options of its URIs."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"endpoint_override=http://{host}:{port}&region=us-east-1&scheme=http"
    server.stop()


@pytest.fixture(scope="session")
def gate(store: str) -> Iterator[Any]:
    """A proxy in front of `store` that lets requests fail (`tests.faults.Proxy`)."""
    from tests.faults import proxy

    with proxy(store) as server:
        yield server


@pytest.fixture
def through(gate: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The proxy, with a client that gives a request up after a second."""
    from pomona.core import object_store
    from pomona.core.object_store import connect

    monkeypatch.setattr(object_store, "REQUEST_TIMEOUT", 1.0)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    connect.cache_clear()
    gate.reset()
    yield gate
    gate.reset()
    connect.cache_clear()
