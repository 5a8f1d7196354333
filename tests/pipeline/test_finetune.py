"""`pomona finetune`: what the stage promises, on tiny photos and a few steps."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.numpy import load_file

from pomona.backbone import extract, mobilenet, weights
from pomona.backbone.spec import make_spec
from pomona.core.errors import JobError, MismatchError, MissingError, RequestError
from pomona.core.progress import Tick
from pomona.finetune.recipe import FROM_TEACHER
from pomona.pipeline.finetune import FinetuneOptions, finetune
from pomona.pipeline.finetune_dataset import hold_out

torch = pytest.importorskip("torch")

from pomona.finetune import trainer  # noqa: E402

OPTIONS = FinetuneOptions(
    start="random:0", label="top", image_size=32, epochs=1.5, batch_size=8, device="cpu"
)
"""Five steps: 28 photos are trained on."""

Finished = tuple[Path, dict[str, Any]]
"""OUT, and the record."""


def fruit(path: Path, label: int, group: int, n: int) -> None:
    """A disc or a square on white, each group of another colour."""
    rng = np.random.default_rng([label, group, n])
    image = Image.new("RGB", (40, 40), "white")
    x, y, size = rng.integers(4, 10), rng.integers(4, 10), rng.integers(20, 26)
    box = [int(v) for v in (x, y, x + size, y + size)]
    colour = tuple(int(v) for v in rng.integers(0, 60, 3) + 45 * group)
    draw = ImageDraw.Draw(image)
    (draw.ellipse if label else draw.rectangle)(box, fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Several threads are slower on photos of 32 pixels, and much slower on a busy machine."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labels of three groups, seven photos each; a bad one; Test has a group of its own."""
    root = tmp_path_factory.mktemp("shapes")
    for label, name in enumerate(("Box", "Ball")):
        for group in range(4):
            split = "Test" if group == 3 else "Training"
            for n in range(7):
                fruit(root / split / name / f"{name} {group}" / f"{n}.jpg", label, group, n)
    (root / "Training" / "Box" / "Box 0" / "bad.jpg").write_bytes(b"no photo")
    return root


@pytest.fixture(scope="module")
def done(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("done")
    return out, finetune(shapes, out, OPTIONS)


# --- the result --------------------------------------------------------------------------------


def test_result_is_weights_like_any(done: Finished, shapes: Path) -> None:
    out, record = done
    place = out / "weights.safetensors"
    tuned = weights.load_weights(str(place))
    assert tuned.digest == record["digests"]["weights"] != weights.load_weights("random:0").digest
    assert set(load_file(place)) == set(mobilenet.shapes())
    groups = {f"Training/{name}/{name} {n}" for name in ("Box", "Ball") for n in range(3)}
    groups -= set(record["held_out"]["groups"])
    assert len(groups) == 4 and set(tuned.tuned_on) == {weights.mark(group) for group in groups}
    photo = next((shapes / "Test").rglob("*.jpg")).read_bytes()
    onnx, pytorch = [features(tuned, photo, kind) for kind in ("onnx", "torch")]
    assert np.allclose(onnx, pytorch, rtol=1e-4, atol=1e-4)


def features(tuned: weights.Weights, photo: bytes, backend: str) -> Any:
    spec = make_spec(tuned, image_size=32, backend=backend, device="cpu")
    batch = pa.record_batch({"path": ["a"], "content": pa.array([photo], pa.binary())})
    (rows,) = list(extract.extract(iter([batch]), spec))
    return np.array(rows["features"][0].as_py(), np.float32)


def test_json_beside_it_says_what_was_done(done: Finished) -> None:
    out, record = done
    about = json.loads((out / "weights.json").read_text())
    assert about == record
    assert about["rejected"] == {"not_an_image": 1} and about["photos"] == 57
    assert about["made_from"]["from"]["name"] == "random:0"
    assert about["held_out"]["by"] == "group" and len(about["held_out"]["groups"]) == 2
    assert not any("Test" in name for name in about["held_out"]["groups"])
    assert about["finished"] and about["ended"] == "planned"
    assert 0 <= about["test"]["accuracy"] <= 1
    steps = [entry["step"] for entry in about["history"]]
    assert steps == sorted(set(steps)) and about["history"][-1]["share"] == 1
    assert not (out / ".finetune").exists()


def test_done_is_not_done_again(done: Finished, shapes: Path) -> None:
    out, record = done
    before = (out / "weights.safetensors").stat().st_mtime_ns
    ticks: list[Tick] = []
    assert finetune(shapes, out, OPTIONS, on_tick=ticks.append) == record
    assert (out / "weights.safetensors").stat().st_mtime_ns == before
    assert {tick.stage for tick in ticks} == {"list"}


def test_a_finished_result_is_not_overwritten(done: Finished, shapes: Path) -> None:
    out, record = done
    with pytest.raises(MismatchError, match="were made with other settings: choose another --out"):
        finetune(shapes, out, replace(OPTIONS, epochs=5))
    assert json.loads((out / "weights.json").read_text()) == record
    assert not (out / ".finetune").exists()


# --- interrupted, killed -----------------------------------------------------------------------


def stop_at(photos: int, error: BaseException) -> Any:
    def on_tick(tick: Tick) -> None:
        if tick.stage == "finetune" and tick.done >= photos:
            raise error

    return on_tick


def test_interrupted_leaves_the_best_and_goes_on(
    done: Finished, shapes: Path, tmp_path: Path
) -> None:
    _, undisturbed = done
    with pytest.raises(KeyboardInterrupt):
        finetune(shapes, tmp_path, OPTIONS, on_tick=stop_at(24, KeyboardInterrupt()))
    about = json.loads((tmp_path / "weights.json").read_text())
    assert not about["finished"] and about["ended"] == "interrupted" and about["test"] == {}
    kept = weights.load_weights(str(tmp_path / "weights.safetensors"))
    assert kept.digest == about["digests"]["weights"]

    with pytest.raises(MismatchError, match=r"other settings: give the same command"):
        finetune(shapes, tmp_path, replace(OPTIONS, seed=3))

    record = finetune(shapes, tmp_path, OPTIONS)
    assert record["digests"] == undisturbed["digests"]
    assert strip(record["history"]) == strip(undisturbed["history"])


def strip(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


def test_interrupted_before_the_first_evaluation_leaves_nothing(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies there then is a random start, which must not pass for weights that were trained."""
    monkeypatch.setattr(trainer, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(trainer, "EVALUATIONS", 1)
    with pytest.raises(KeyboardInterrupt):
        finetune(shapes, tmp_path, OPTIONS, on_tick=stop_at(16, KeyboardInterrupt()))
    assert (tmp_path / ".finetune" / trainer.CHECKPOINT).exists()
    assert not (tmp_path / "weights.safetensors").exists()
    assert not (tmp_path / "weights.json").exists()


@pytest.mark.slow
def test_killed_goes_on(done: Finished, shapes: Path, tmp_path: Path, command: Any) -> None:
    """A real process, and a real kill."""
    _, undisturbed = done
    words = ["finetune", str(shapes), "--out", str(tmp_path), "--from", "random:0"]
    words += ["--label", "top", "--image-size", "32", "--epochs", "1.5", "--batch-size", "8"]
    words += ["--device", "cpu", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pomona", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (tmp_path / ".finetune" / trainer.CHECKPOINT).exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "weights.json").exists()

    code, stdout, stderr = command(*words)
    assert code == 0, stderr
    record = json.loads(stdout)
    assert record["digests"] == undisturbed["digests"]
    assert strip(record["history"]) == strip(undisturbed["history"])
    assert "mlflow.db" in record["mlflow"]


# --- what is asked -----------------------------------------------------------------------------


def test_nothing_held_out_keeps_the_last(shapes: Path, tmp_path: Path) -> None:
    record = finetune(shapes, tmp_path, replace(OPTIONS, hold_out=0.0, epochs=0.4))
    assert record["held_out"]["photos"] == 0 and "accuracy" not in record["held_out"]
    assert record["held_out"]["share"] == 1 and record["ended"] == "planned"


def test_minutes_end_in_time(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "PATIENCE", 99)
    monkeypatch.setattr(trainer, "EVALUATIONS", 4)
    # Each look at the clock takes 0.1 s: how many steps fit in isn't the machine's affair.
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(ticks) / 10)
    monkeypatch.setattr(trainer, "time", clock)
    options = replace(OPTIONS, epochs=None, minutes=1.5 / 60)
    record = finetune(shapes, tmp_path, options)
    assert record["history"][-1]["share"] == 1
    assert 5 < record["history"][-1]["step"] <= 15  # a step takes 0.1 s or more
    assert record["ended"] == "planned"
    assert record["times"]["seconds"] < 2  # of that clock; the last evaluation comes on top
    assert clock.monotonic() < 5  # with the looks between steps: none goes on afterwards


def test_it_says_that_the_start_saw_what_is_held_out(
    done: Finished, shapes: Path, tmp_path: Path
) -> None:
    """Another seed holds other groups out, and the start was tuned on those."""
    start = tmp_path / "start.safetensors"
    start.write_bytes((done[0] / "weights.safetensors").read_bytes())
    first = done[1]["held_out"]
    assert not first["weights_saw"]
    seeds = (n for n in range(1, 20) if _held_out(n) != set(first["groups"]))
    options = replace(OPTIONS, start=str(start), epochs=0.3, seed=next(seeds), teacher="none")
    second = finetune(shapes, tmp_path / "out", options)
    assert second["held_out"]["weights_saw"]
    assert second["recipe"]["seed"] == options.seed != done[1]["recipe"]["seed"]
    known = set(weights.load_weights(str(start)).tuned_on)
    assert known < set(weights.load_weights(str(tmp_path / "out" / "weights.safetensors")).tuned_on)


def _held_out(seed: int) -> set[str]:
    """Which of the shapes' groups a seed holds out."""
    labels, groups = np.repeat([0, 1], 21), np.repeat(np.arange(6), 7)
    # Ball before Box, as the folders' names are sorted.
    names = [f"Training/{name}/{name} {n}" for name in ("Ball", "Box") for n in range(3)]
    rows = hold_out(labels, groups, OPTIONS.hold_out, seed)
    return {names[group] for group in groups[rows]}


@dataclass(frozen=True)
class Distilled:
    """A run from a random start, with weights of another run as its teacher."""

    teacher: dict[str, Any]
    checkpoint: dict[str, Any]
    result: dict[str, Any]
    record: dict[str, Any]


@pytest.fixture(scope="module")
def distilled(done: Finished, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Distilled:
    folder = tmp_path_factory.mktemp("distilled")
    teacher = folder / "teacher.safetensors"
    teacher.write_bytes((done[0] / "weights.safetensors").read_bytes())
    out, options = folder / "out", replace(OPTIONS, start="random:3", teacher=str(teacher))
    with pytest.raises(KeyboardInterrupt):
        finetune(shapes, out, options, on_tick=stop_at(32, KeyboardInterrupt()))
    with safe_open(out / ".finetune" / trainer.CHECKPOINT, "np") as file:
        checkpoint = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    record = finetune(shapes, out, options)
    return Distilled(load_file(teacher), checkpoint, load_file(out / "weights.safetensors"), record)


def test_what_is_written_holds_no_teacher(distilled: Distilled) -> None:
    states = distilled.teacher, mobilenet.folded(distilled.teacher)
    theirs = {value.tobytes() for state in states for value in state.values()}
    assert not theirs & {value.tobytes() for value in distilled.checkpoint.values()}
    assert not theirs & {value.tobytes() for value in distilled.result.values()}
    assert distilled.record["made_from"]["teacher"]["name"] == "teacher.safetensors"


def test_nothing_is_evaluated_while_blocks_learn_apart(distilled: Distilled) -> None:
    record = distilled.record
    assert record["recipe"]["apart"] == FROM_TEACHER["apart"]
    assert record["history"][0]["share"] >= record["recipe"]["apart"]
    assert record["ended"] == "planned"


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"epochs": 0.0}, "--epochs is above 0"),
        ({"minutes": -1.0}, "--minutes is above 0"),
        ({"image_size": 8}, "--image-size is 32 to 512"),
        ({"batch_size": 1}, "--batch-size is at least 2"),
        ({"hold_out": 0.9}, "--hold-out is a share from 0 to 0.5"),
        ({"seed": -1}, "--seed is at least 0"),
        ({"precision": "half"}, "--precision is auto, float32, mixed"),
        ({"processes": 5}, "--processes is 1 to half of --batch-size"),
        ({"label": "middle"}, "--label is parent or top"),
        ({"device": "tpu"}, "--device is auto, cpu or cuda"),
        ({"start": "random:x"}, "random weights are named random:SEED"),
    ],
)
def test_wrong_options_are_one_line(
    change: dict[str, Any], line: str, shapes: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=line) as caught:
        finetune(shapes, tmp_path, replace(OPTIONS, **change))
    assert caught.value.exit_code == 2


def test_one_label_is_not_enough(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="needs photos of two labels"):
        finetune(shapes / "Training" / "Ball" / "Ball 0", tmp_path, OPTIONS)


def test_onnx_is_no_start(shapes: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    file.write_bytes(mobilenet.to_onnx(mobilenet.random_state(0), 32, "a", "b"))
    with pytest.raises(RequestError, match=r"is ONNX: training needs \.safetensors or \.pth"):
        finetune(shapes, tmp_path / "out", replace(OPTIONS, start=str(file)))


def test_without_torch_it_is_one_line(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingError, match=r"pip install 'pomona\[torch\]'"):
        finetune(shapes, tmp_path, OPTIONS)


def test_a_full_disk_is_told_before(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(JobError, match=r"has 0.0 GB left, and finetune needs 0.2"):
        finetune(shapes, tmp_path, OPTIONS)


# --- several processes -------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    # Spark's TorchDistributor leaves the pipe to its child open.
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
@pytest.mark.slow
def test_two_processes_learn_what_one_does(
    shapes: Path,
    tmp_path: Path,
    spark: Any,
    done: Finished,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With batch norms folded, a batch in two halves gives the same sums, but for rounding."""
    start = tmp_path / "start.safetensors"
    start.write_bytes((done[0] / "weights.safetensors").read_bytes())
    # Nothing is held out, or the start itself might be the best.
    options = replace(OPTIONS, start=str(start), epochs=0.6, hold_out=0.0)
    one = finetune(shapes, tmp_path / "one", options)
    two = finetune(shapes, tmp_path / "two", replace(options, processes=2))
    assert capfd.readouterr().out == ""
    assert two["ended"] == "planned" and two["made_from"]["teacher"]["name"] == start.name
    a, b = one["history"], two["history"]
    assert [entry["step"] for entry in a] == [entry["step"] for entry in b]
    for ours, theirs in zip(a, b, strict=True):
        assert theirs["training_loss"] == pytest.approx(ours["training_loss"], rel=0.02)
    mine = load_file(tmp_path / "one" / "weights.safetensors")
    other = load_file(tmp_path / "two" / "weights.safetensors")
    first = load_file(start)
    moved = max(float(np.abs(value - first[key]).max()) for key, value in mine.items())
    for key, value in mine.items():
        assert np.abs(value - other[key]).max() < 0.05 * moved, key
