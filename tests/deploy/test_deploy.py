"""The containers' files, and their commands that run without a container engine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import fill
from tests.docs.test_notebook import SMALL, run_here

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
ENGINE_FREE = {"JUPYTER_TOKEN": "not-a-secret", "POMONA_PHOTOS": str(ROOT)}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return found


def test_ports_are_this_machines_and_nothing_runs_as_root(services: dict[str, Any]) -> None:
    ports = {port for service in services.values() for port in service["ports"]}
    assert ports == {f"127.0.0.1:{n}:{n}" for n in (8889, 4049, 5009)}
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert "healthcheck" in service
        assert "memory" in service["deploy"]["resources"]["limits"]
    stages = re.split(r"^FROM ", (DEPLOY / "Dockerfile").read_text(), flags=re.M)[1:]
    final = {stage.split()[2]: stage for stage in stages}
    for target in {service["build"]["target"] for service in services.values()}:
        assert re.findall(r"^USER (\w+)", final[target], re.M) == ["1000"]


def test_profiles(services: dict[str, Any]) -> None:
    assert {name: service["profiles"] for name, service in services.items()} == {
        "jupyter": ["cpu"],
        "jupyter-gpu": ["gpu"],
        "mlflow": ["cpu", "gpu"],
    }
    devices = services["jupyter-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["driver"] == "nvidia"
    assert "utility" in devices[0]["capabilities"]  # pomona asks nvidia-smi for the memory


def test_no_secret_is_in_the_files() -> None:
    """The token comes from outside, must be there, and has no default."""
    text = (DEPLOY / "compose.yaml").read_text()
    assert re.findall(r"JUPYTER_TOKEN: (.*?)[?]", text) == ["${JUPYTER_TOKEN:"]
    assert re.findall(r"^JUPYTER_TOKEN=(.*)$", (DEPLOY / ".env.example").read_text(), re.M) == [""]
    assert "/deploy/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_variables_are_explained() -> None:
    wanted = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
    given = set(re.findall(r"^(\w+)=", (DEPLOY / ".env.example").read_text(), re.M))
    assert wanted <= given


def test_pins_of_jupyter_agree_with_the_others() -> None:
    def pins(path: Path) -> set[str]:
        names = re.findall(r"^([\w.-]+)==", path.read_text(), re.M)
        return set(names)

    assert not pins(DEPLOY / "jupyter.txt") & pins(ROOT / "constraints.txt")
    assert "jupyterlab" in pins(DEPLOY / "jupyter.txt")


def compose() -> list[str]:
    if shutil.which("docker"):
        told = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        if told.returncode == 0:
            return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    pytest.skip("neither docker compose nor docker-compose is here")


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_compose_takes_the_file(profile: str) -> None:
    command = [*compose(), "-f", str(DEPLOY / "compose.yaml"), "--profile", profile, "config", "-q"]
    env = {**os.environ, **ENGINE_FREE}
    told = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    for name in ENGINE_FREE:
        refused = subprocess.run(
            command, env={**env, name: ""}, capture_output=True, text=True, check=False
        )
        assert refused.returncode
        assert "set it in deploy/.env" in refused.stderr


# --- MLflow's command --------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def server(
    services: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int]]:
    """MLflow as compose.yaml starts it, with another port and folder."""
    pytest.importorskip("mlflow")
    port, folder = free_port(), tmp_path_factory.mktemp("mlflow")
    given = [
        re.sub(r"(?<==)0\.0\.0\.0$", "127.0.0.1", word)
        .replace("/mlflow/", f"{folder}/")
        .replace("5009", str(port))
        for word in services["mlflow"]["command"]
    ]
    env = {**os.environ, **services["mlflow"]["environment"]}
    command = [sys.executable, "-m", *given]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        try:
            for _ in range(1200):
                if process.poll() is not None or answers(port, "/health") == 200:
                    break
                time.sleep(0.5)
            assert answers(port, "/health") == 200, (folder / "log").read_text()
            yield f"http://127.0.0.1:{port}", port
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # the server's own child too


def answers(port: int, path: str, host: str | None = None) -> int:
    """The HTTP status that a server answers; 0 if it doesn't answer."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if host:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=10) as found:
            return int(found.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return 0


EXPERIMENTS = "/api/2.0/mlflow/experiments/search?max_results=1"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:FigureCanvasAgg is non")
def test_notebook_records_in_the_server_and_leaves_a_session_of_others_alone(
    spark: Any,
    server: tuple[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("matplotlib", "sklearn"):
        pytest.importorskip(module)
    import mlflow

    uri, port = server
    # Compose's name of the service is answered, names that an attacker could own are not.
    assert answers(port, EXPERIMENTS, f"mlflow:{port}") == 200
    assert answers(port, EXPERIMENTS, f"elsewhere.example:{port}") == 403
    source = fill(tmp_path / "photos")
    own = {
        "SOURCE": str(source),
        "OUT": str(tmp_path / "out"),
        "WEIGHTS": "random:0",
        "MASTER": "no-such-master",  # it isn't asked for where a session is active
        "MLFLOW": uri,
        "EXPERIMENT": "notebooks",
    }
    lines = "".join(f"{name} = {value!r}\n" for name, value in own.items())
    names = run_here(SMALL + lines, tmp_path, monkeypatch)
    assert names["spark"] is spark
    assert spark.range(3).count() == 3
    assert names["extracted"]["photos"] == 48
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("notebooks")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["variance_kept"] == names["fitted"].kept
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"model", "report"}
