from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import photo

RANDOM = ["--weights", "random:0", "--image-size", "32", "--device", "cpu"]


@pytest.fixture
def pomona(command: Any) -> Any:
    """Call the command in this process, on the running session; returns (code, stdout, stderr)."""
    return command


@pytest.mark.slow
def test_run_ends_with_a_summary(pomona: Any, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [*RANDOM, "--components", 5, "--no-mlflow"]
    code, printed, errors = pomona("run", source, "--out", out, *options)
    assert code == 0, errors
    expected = ["48 (24 Training, 24 Test)", "random:0 (untrained)", "photos/s", "256.0 : 1"]
    expected += ["by 5 components", f"{out}/features", "component  variance  cumulative"]
    expected += ["macro F1", "Test (24 photos)", f"{out}/model", f"{out}/report/report.html"]
    assert [words for words in expected if words not in printed] == []
    assert "extracting features: 48 of 48" in errors
    assert "\x1b[" not in printed + errors
    assert pomona("status", "--out", out)[1].splitlines()[1].split() == ["photos", "48"]


def test_json_is_for_machines(pomona: Any, source: Path, tmp_path: Path) -> None:
    options = [*RANDOM, "--components", "0.5", "--no-mlflow", "--no-plots", "--json"]
    code, printed, _ = pomona("run", source, "--out", tmp_path / "out", *options)
    records = json.loads(printed)
    assert code == 0
    assert records["extract"]["photos"] == 48
    assert records["reduce"]["variance_kept"] >= 0.5
    assert records["train"]["metrics"]["test"]["photos"] == 24
    assert [p.name for p in (tmp_path / "out" / "report").iterdir()] == ["metrics.json"]
    status = json.loads(pomona("status", "--out", tmp_path / "out", "--json")[1])
    assert (status["done"], status["todo"], status["rejected"]) == (48, 0, {})


def test_too_many_rejected_is_3(pomona: Any, source: Path, tmp_path: Path) -> None:
    for n in range(4):
        (source / "Training" / "Fruit 0" / f"bad{n}.jpg").write_bytes(b"")
    code, printed, errors = pomona("extract", source, "--out", tmp_path / "out", *RANDOM)
    assert code == 3
    assert "7.7% of the photos can't be used" in errors.splitlines()[-1]
    assert "4 (4 empty)" in printed
    options = [*RANDOM, "--max-error-rate", "0.1"]
    assert pomona("extract", source, "--out", tmp_path / "out", *options)[0] == 0


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["run", "{no}", "--out", "{out}"], "does not exist"),
        (["run", "{source}", "--out", "{source}/out"], "inside the source"),
        (["run", "{source}", "--out", "{out}", "--components", "1.5"], "--components is a count"),
        (["run", "{source}", "--out", "{out}", "--label", "best"], "parent or top"),
        (["run", "{source}", "--out", "{out}", "--weights", "{no}"], "no weights at"),
        (["run", "{source}", "--out", "{out}", "--backend", "jax"], "onnx or torch"),
        (["run", "{source}", "--out", "{out}", "--image-size", "9"], "32 to 1024"),
        (["run", "{source}", "--out", "{out}", "--test-fraction", "0.2"], "leave the option out"),
        (["run", "{source}", "--out", "{out}", "--spark-conf", "x"], "KEY=VALUE"),
        (["run", "{source}", "--out", "{out}", "--reader", "x"], "auto or spark"),
        (["run", "{source}", "--out", "{out}", "--max-error-rate", "7"], "between 0 and 1"),
        (["run", "{source}", "--out", "hdfs://n/out"], "a folder, s3://… or gs://…, not hdfs://n/out"),
        (["reduce", "--out", "{no}"], "pomona extract"),
        (["status", "--out", "{no}"], "pomona extract"),
        (["subset", "{source}", "{source}/x"], "inside the source"),
        (["subset", "{source}", "{out}", "--percentage", "0"], "--percentage is above 0"),
        (["inspect", "hdfs://nn/p"], "reads local folders"),
        (["synthesize", "{out}", "--classes", "500"], "131"),
        (["synthesize", "{source}/readme.txt"], "not a folder"),
        (["run", "{no}", "--out", "file://{out}"], "does not exist"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_line_and_2(
    pomona: Any, source: Path, tmp_path: Path, words: list[str], rule: str
) -> None:
    places = {"source": source, "out": tmp_path / "out", "no": tmp_path / "nothing"}
    (source / "readme.txt").write_text("x")
    request = [word.format(**places) for word in words]
    extra = [] if "--weights" in request or words[0] not in ("run", "extract") else RANDOM[:2]
    code, printed, errors = pomona(*request, *extra)
    assert code == 2, errors
    assert printed == ""
    assert rule in errors.splitlines()[-1]
    assert errors.splitlines()[-1].startswith("pomona: ")
    assert "Traceback" not in errors


@pytest.mark.parametrize("words", [["run"], ["run", "x", "--nonsense"], ["fly"]])
def test_usage_errors_are_2(pomona: Any, words: list[str]) -> None:
    code, _, errors = pomona(*words)
    assert code == 2
    assert "Traceback" not in errors


def test_a_refused_request_leaves_nothing(pomona: Any, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pomona("run", source, "--out", out, "--weights", tmp_path / "no")
    assert not out.exists()
    (tmp_path / "empty").mkdir()
    assert pomona("run", tmp_path / "empty", "--out", out, *RANDOM)[0] == 2
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("x")
    assert pomona("run", tmp_path / "empty", "--out", out, *RANDOM)[0] == 2
    assert (out / "mine.txt").exists()


def test_a_bug_leaves_its_traceback_in_the_log(
    pomona: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("an oversight")

    monkeypatch.setattr("pomona.pipeline.extract.arrange", broken)
    code, _, errors = pomona("extract", source, "--out", tmp_path / "out", *RANDOM)
    assert code == 1
    assert "a bug in Pomona (KeyError)" in errors.splitlines()[-1]
    log = (tmp_path / "out" / "pomona.log").read_text()
    assert "Traceback" in log
    assert "an oversight" in log


def test_inspect(pomona: Any, source: Path) -> None:
    (source / "Training" / "Fruit 0" / "copy.jpg").write_bytes(photo(0))
    (source / "Test" / "Fruit 1" / "leak.jpg").write_bytes(photo(0))
    (source / "Training" / "Rare").mkdir()
    (source / "Training" / "Rare" / "1.png").write_bytes(photo(5, (40, 30), "PNG"))
    (source / "Training" / "Rare" / "text.jpg").write_text("hello")
    (source / "readme.txt").write_text("x")
    (source / "papers").mkdir()
    (source / "papers" / "figure.png").write_bytes(photo(6))
    record = json.loads(pomona("inspect", source, "--json")[1])
    assert record["photos"] == 48 + 4
    assert record["splits"] == {"Training": 27, "Test": 25}
    assert record["labels"] == 4
    assert record["largest"][0] == ["Fruit 0", 17]
    assert record["smallest"][0] == ["Rare", 2]
    assert record["only_in"] == {"Training": ["Rare"], "Test": []}
    assert record["pixel_sizes"] == [["100×100", 50], ["40×30", 1]]
    assert record["unrecognised"] == 1
    assert (record["duplicates"]["within"], record["duplicates"]["between"]) == (1, 1)
    assert record["not_photos"] == {".txt": 1}
    assert record["outside_splits"] == 1
    code, printed, _ = pomona("inspect", source)
    assert code == 0
    assert "52 (27 Training, 25 Test)" in printed


def test_subset(pomona: Any, source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        words = ["subset", source, tmp_path / name, "--percentage", 25, "--json"]
        assert json.loads(pomona(*words)[1])["photos"] == 12
    chosen = {p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.jpg")}
    assert chosen == {p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*.jpg")}
    assert all((tmp_path / "a" / p).read_bytes() == (source / p).read_bytes() for p in chosen)
    assert {len(list(f.iterdir())) for f in (tmp_path / "a").glob("*/*")} == {2}
    pomona("subset", source, tmp_path / "few", "--percentage", 0.01, "--copy")
    few = list((tmp_path / "few").rglob("*.jpg"))
    assert len(few) == 6  # one for each split and label
    assert {p.stat().st_nlink for p in few} == {1}
    (tmp_path / "file").write_text("x")
    for taken in ("a", "file"):
        code, _, errors = pomona("subset", source, tmp_path / taken)
        assert (code, "is not an empty folder" in errors) == (2, True)
    (source / "Training" / "Fruit 0" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    words = ["subset", source, tmp_path / "all", "--percentage", 100, "--copy", "--json"]
    assert json.loads(pomona(*words)[1])["photos"] == 48


def test_synthesize(pomona: Any, tmp_path: Path) -> None:
    words = ["synthesize", tmp_path / "f", "--classes", 3, "--images", 30, "--workers", 1, "--json"]
    code, printed, _ = pomona(*words)
    assert (code, json.loads(printed)["photos"]) == (0, 30)
    assert len(list((tmp_path / "f").glob("*/*/*.jpg"))) == 30


@pytest.mark.slow
def test_demo(pomona: Any, tmp_path: Path) -> None:
    code, printed, errors = pomona("demo", "--out", tmp_path / "demo", "--images", 120)
    assert code == 0, errors
    assert "124 (" in printed
    assert "4 (1 empty, 1 not_an_image, 1 too_large, 1 truncated)" in printed
    assert "fruits" in printed and "untrained" not in printed
    with (tmp_path / "demo" / "out" / "rejected.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_an_object_store_end_to_end(pomona: Any, tmp_path: Path, store: str) -> None:
    from pyarrow.fs import FileSystem

    uri = f"s3://fruit?{store}&allow_bucket_creation=true&allow_delayed_open=true"
    filesystem: Any = FileSystem.from_uri(uri)[0]
    filesystem.create_dir("fruit")
    for n in range(30):
        split = "Test" if n % 3 else "Training"
        with filesystem.open_output_stream(f"fruit/my photos/{split}/Été {n % 2}/{n}.jpg") as file:
            file.write(photo(n) if n else b"")
    source = f"s3://fruit/my photos?{store}"
    options = [*RANDOM, "--components", 3, "--no-mlflow", "--json"]
    code, printed, errors = pomona("run", source, "--out", tmp_path / "out", *options)
    assert code == 0, errors
    record = json.loads(printed)["extract"]
    assert (record["photos"], record["rejected"]) == (30, {"empty": 1})
    assert record["source"] == "s3://fruit/my photos"  # without the options
    assert json.loads(pomona("inspect", source, "--json")[1])["photos"] == 30
    assert pomona("run", source, "--out", tmp_path / "out", *options)[0] == 0


# --- real processes ----------------------------------------------------------------------------


def process(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pomona", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **env}, timeout=600, check=False
    )


def test_help_is_instant() -> None:
    """Without the libraries that a run needs; --version too."""
    code = (
        "import sys; sys.argv = ['pomona', '--help']\n"
        "from pomona.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'pyarrow', 'pyspark', 'onnxruntime', 'torch', 'PIL', 'mlflow'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert process("--version").stdout.startswith("pomona ")


@pytest.mark.slow
def test_the_core_needs_no_extra(source: Path, tmp_path: Path) -> None:
    """What the extras and the tests bring is hidden from the driver."""
    hidden = ["torch", "mlflow", "matplotlib", "sklearn", "scipy", "psutil", "duckdb", "boto3"]
    hidden += ["pyspark", "py4j"]
    words = ["run", str(source), "--out", str(tmp_path / "out"), *RANDOM, "--components", "3"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden!r})); sys.argv[1:] = {words!r}\n"
        "from pomona.cli.main import main\n"
        "main()\n"
    )

    def run(*extra: str) -> subprocess.CompletedProcess[str]:
        script = code.replace("\nfrom", f"; sys.argv += {list(extra)!r}\nfrom", 1)
        command = [sys.executable, "-c", script]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)

    refused = run()
    assert refused.returncode == 2
    assert "pip install 'pomona[report]', or add --no-plots" in refused.stderr
    refused = run("--no-plots")
    assert "pip install 'pomona[train]' (pomona run --no-train" in refused.stderr
    done = run("--no-plots", "--no-train")
    assert done.returncode == 0, done.stderr
    assert "pip install 'pomona[track]'" in done.stdout


def test_no_java_is_one_line(source: Path, tmp_path: Path) -> None:
    refused = process(
        "extract",
        source,
        *("--out", tmp_path / "out", "--master", "local[2]"),
        *RANDOM,
        JAVA_HOME=str(tmp_path),
    )
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("pomona: Spark needs Java 17")
    assert "apt-get install" in refused.stderr


def test_a_terminal_shows_a_bar(source: Path, tmp_path: Path) -> None:
    """Also while workers start, whose output goes to the log."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    request = ["extract", str(source), "--out", str(tmp_path / "out"), *RANDOM]
    command = [sys.executable, "-m", "pomona", *request]
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=env) as child:
        os.close(theirs)
        output = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while chunk := os.read(ours, 65536):
                output += chunk
    os.close(ours)
    assert child.returncode == 0
    text = output.decode()
    for words in ("starting workers", "extracting features", "48/48", "\x1b["):
        assert words in text
    assert "\x1b[" not in (tmp_path / "out" / "pomona.log").read_text()


def test_sparks_noise_goes_to_the_log(source: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out", "--master", "local[2]")
    done = process("extract", source, *out, *RANDOM)
    assert done.returncode == 0
    assert "WARN" not in done.stderr + done.stdout
    assert "log4j" in (tmp_path / "out" / "pomona.log").read_text()
