"""`pomona finetune`: what it promises, on tiny photos and a few steps."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
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
from pomona.finetune import augmentation, recipe, trainer
from pomona.finetune.network import Data, Network, World, build, features_of, pooled, weights_of
from pomona.finetune.recipe import Plan, Recipe, factor
from pomona.photos import decoding
from pomona.pipeline.finetune import FinetuneOptions, finetune

torch = pytest.importorskip("torch")

OPTIONS = FinetuneOptions(
    start="random:0", label="top", image_size=32, epochs=3, batch_size=8, device="cpu"
)


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
def done(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("done")
    return out, finetune(shapes, out, OPTIONS)


# --- the whole stage ---------------------------------------------------------------------------


def test_result_is_weights_like_any(done: tuple[Path, dict[str, Any]], shapes: Path) -> None:
    out, record = done
    place = out / "weights.safetensors"
    found = weights.load_weights(str(place))
    assert found.digest == record["digests"]["weights"] != weights.load_weights("random:0").digest
    assert set(load_file(place)) == set(mobilenet.shapes())
    kinds = {f"Training/{name}/{name} {n}" for name in ("Box", "Ball") for n in range(3)}
    kinds -= set(record["held_out"]["groups"])
    assert len(kinds) == 4 and set(found.tuned_on) == {weights.mark(kind) for kind in kinds}
    photo = next((shapes / "Test").rglob("*.jpg")).read_bytes()
    got = [features(found, photo, kind, 32) for kind in ("onnx", "torch")]
    assert np.allclose(got[0], got[1], rtol=1e-4, atol=1e-4)


def features(found: weights.Weights, photo: bytes, backend: str, size: int) -> Any:
    spec = make_spec(found, image_size=size, backend=backend, device="cpu")
    batch = pa.record_batch({"path": ["a"], "content": pa.array([photo], pa.binary())})
    (rows,) = list(extract.extract(iter([batch]), spec))
    return np.array(rows["features"][0].as_py(), np.float32)


def test_json_beside_it_says_what_was_done(done: tuple[Path, dict[str, Any]]) -> None:
    out, record = done
    about = json.loads((out / "weights.json").read_text())
    assert about == record
    assert about["rejected"] == {"not_an_image": 1} and about["photos"] == 57
    assert about["made_from"]["from"]["name"] == "random:0"
    assert about["held_out"]["by"] == "group" and len(about["held_out"]["groups"]) == 2
    assert not any("Test" in name for name in about["held_out"]["groups"])
    assert about["finished"] and about["ended"] == "planned"
    assert 0 <= about["test"]["accuracy"] <= 1
    steps = [look["step"] for look in about["history"]]
    assert steps == sorted(set(steps)) and about["history"][-1]["share"] == 1
    assert not (out / ".finetune").exists()


def test_the_seed_decides(done: tuple[Path, dict[str, Any]], shapes: Path, tmp_path: Path) -> None:
    _, record = done
    again = finetune(shapes, tmp_path / "a", OPTIONS)
    assert again["digests"] == record["digests"]
    other = finetune(shapes, tmp_path / "b", replace(OPTIONS, seed=1, epochs=1))
    assert other["digests"] != record["digests"]


def test_done_is_not_done_again(done: tuple[Path, dict[str, Any]], shapes: Path) -> None:
    out, record = done
    before = (out / "weights.safetensors").stat().st_mtime_ns
    ticks: list[Tick] = []
    assert finetune(shapes, out, OPTIONS, on_tick=ticks.append) == record
    assert (out / "weights.safetensors").stat().st_mtime_ns == before
    assert {tick.stage for tick in ticks} == {"list"}


def stop_at(photos: int, error: BaseException) -> Any:
    def on_tick(tick: Tick) -> None:
        if tick.stage == "finetune" and tick.done >= photos:
            raise error

    return on_tick


def test_interrupted_leaves_the_best_and_goes_on(
    done: tuple[Path, dict[str, Any]], shapes: Path, tmp_path: Path
) -> None:
    _, undisturbed = done
    with pytest.raises(KeyboardInterrupt):
        finetune(shapes, tmp_path, OPTIONS, on_tick=stop_at(48, KeyboardInterrupt()))
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
    return [{k: v for k, v in look.items() if k != "seconds"} for look in history]


def test_interrupted_before_anything_was_judged_leaves_nothing(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies there then is a random start, which must not pass for weights that were trained."""
    monkeypatch.setattr(trainer, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(trainer, "LOOKS", 1)
    with pytest.raises(KeyboardInterrupt):
        finetune(shapes, tmp_path, OPTIONS, on_tick=stop_at(16, KeyboardInterrupt()))
    assert (tmp_path / ".finetune" / trainer.CHECKPOINT).exists()
    assert not (tmp_path / "weights.safetensors").exists()
    assert not (tmp_path / "weights.json").exists()


def test_a_finished_result_is_not_overwritten(
    done: tuple[Path, dict[str, Any]], shapes: Path
) -> None:
    out, record = done
    with pytest.raises(MismatchError, match="were made with other settings: choose another --out"):
        finetune(shapes, out, replace(OPTIONS, epochs=5))
    assert json.loads((out / "weights.json").read_text()) == record
    assert not (out / ".finetune").exists()


def test_a_loss_that_is_no_number_ends_it() -> None:
    rules, data = tiny(rate=1e-3)
    state = mobilenet.random_state(0)
    state["features.0.0.weight"] = state["features.0.0.weight"] * np.float32(np.nan)
    run = trainer.Run(rules, data, state, Plan(steps=3))
    with pytest.raises(JobError, match="no number any more at step 1"):
        run.step()


def test_a_full_disk_is_told_before(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(JobError, match=r"has 0.0 GB left, and finetune needs 0.2"):
        finetune(shapes, tmp_path, OPTIONS)


def test_it_says_that_the_start_saw_what_is_held_out(
    done: tuple[Path, dict[str, Any]], shapes: Path, tmp_path: Path
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
    known = set(weights.load_weights(str(start)).tuned_on)
    assert known < set(weights.load_weights(str(tmp_path / "out" / "weights.safetensors")).tuned_on)


def _held_out(seed: int) -> set[str]:
    """Which of the shapes' groups a seed holds out."""
    labels, groups = np.repeat([0, 1], 21), np.repeat(np.arange(6), 7)
    # Ball before Box, as the folders' names are sorted.
    names = [f"Training/{name}/{name} {n}" for name in ("Ball", "Box") for n in range(3)]
    rows = recipe.hold_out(labels, groups, OPTIONS.hold_out, seed)
    return {names[group] for group in groups[rows]}


def test_killed_goes_on(done: tuple[Path, dict[str, Any]], shapes: Path, tmp_path: Path) -> None:
    """A real process, and a real kill."""
    _, undisturbed = done
    command = [sys.executable, "-m", "pomona", "finetune", str(shapes), "--out", str(tmp_path)]
    command += ["--from", "random:0", "--label", "top", "--image-size", "32", "--epochs", "3"]
    command += ["--batch-size", "8", "--device", "cpu", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (tmp_path / ".finetune" / trainer.CHECKPOINT).exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "weights.json").exists()

    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    record = json.loads(again.stdout)
    assert record["digests"] == undisturbed["digests"]
    assert "mlflow.db" in record["mlflow"]


def test_stops_early_when_held_out_groups_say_so(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "PATIENCE", 2)
    monkeypatch.setattr(trainer, "order", lambda about: (-about.get("step", 99), 0.0))
    record = finetune(shapes, tmp_path, OPTIONS)
    assert record["ended"] == "early"
    assert record["held_out"]["step"] == 1 and record["history"][-1]["step"] == 3


def test_nothing_held_out_keeps_the_last(shapes: Path, tmp_path: Path) -> None:
    record = finetune(shapes, tmp_path, replace(OPTIONS, hold_out=0.0, epochs=1))
    assert record["held_out"]["photos"] == 0 and "accuracy" not in record["held_out"]
    assert record["held_out"]["share"] == 1 and record["ended"] == "planned"


def test_minutes_end_in_time(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "PATIENCE", 99)
    # Each look at the clock takes 0.1 s: how many steps fit in isn't the machine's affair.
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(ticks) / 10)
    monkeypatch.setattr(trainer, "time", clock)
    options = replace(OPTIONS, epochs=None, minutes=3 / 60)
    record = finetune(shapes, tmp_path, options)
    assert record["history"][-1]["share"] == 1
    assert 5 < record["history"][-1]["step"] <= 30  # a step takes 0.1 s or more
    assert record["ended"] == "planned"
    assert record["times"]["seconds"] < 3.5  # of that clock; the last look comes on top
    assert clock.monotonic() < 10  # all looks, with those between steps: none goes on afterwards


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


# --- batch norms -------------------------------------------------------------------------------


def with_statistics() -> dict[str, Any]:
    """Weights as training leaves them: every batch norm has statistics of its own."""
    rng = np.random.default_rng(5)
    state = mobilenet.random_state(3)
    for conv in mobilenet.convs():
        n = conv.outputs
        state[f"{conv.norm}.weight"] = rng.uniform(0.5, 1.5, n).astype(np.float32)
        state[f"{conv.norm}.bias"] = rng.normal(0, 0.2, n).astype(np.float32)
        state[f"{conv.norm}.running_mean"] = rng.normal(0, 0.2, n).astype(np.float32)
        state[f"{conv.norm}.running_var"] = rng.uniform(0.5, 2, n).astype(np.float32)
    return state


@pytest.mark.parametrize("norm", [False, True])
def test_before_the_first_step_features_are_extract_s(norm: bool, shapes: Path) -> None:
    """Folded or not: what is trained starts as the network that extract runs."""
    photo = next((shapes / "Test").rglob("*.jpg")).read_bytes()
    for state in (with_statistics(), mobilenet.unfolded(mobilenet.folded(with_statistics()))):
        found = weights.Weights("a", "b", state=state)
        wanted = features(found, photo, "onnx", 32)
        network = build(state, {}, norm=norm)
        pixels = decoding.decode(photo, 32).pixels
        assert pixels is not None
        got = features_of(network, pixels[None], np.array([0]), "cpu")[0].numpy()
        assert np.allclose(got, wanted, rtol=1e-4, atol=1e-4)
        back = weights_of(Network({}, norm=norm).state_dict(), norm=norm)
        assert set(back) == set(mobilenet.shapes())
        same = weights_of(network.state_dict(), norm=norm)
        there = features(weights.Weights("a", "b", state=same), photo, "onnx", 32)
        assert np.allclose(there, wanted, rtol=1e-4, atol=1e-4)


# --- from a random start, with a teacher -------------------------------------------------------


def tiny(norm: bool = True, **changes: Any) -> tuple[Recipe, Data]:
    rng = np.random.default_rng(0)
    photos = rng.integers(0, 256, (24, 32, 32, 4), dtype=np.uint8)
    labels, groups = np.arange(24) % 2, np.arange(24) % 4
    rows = np.arange(24)
    data = Data(photos, labels, groups, rows[:16], rows[16:20], rows[20:])
    return Recipe(image_size=32, batch_size=8, norm=norm, **changes), data


def test_no_value_of_the_teacher_gets_in() -> None:
    """A random start is a function of the seed; the teacher is no part of what learns."""
    start = mobilenet.random_state(4)
    teacher = with_statistics()
    rules, data = tiny(distill=5.0)
    plan = Plan(steps=3)
    run = trainer.Run(rules, data, start, plan, teacher=teacher)
    alone = trainer.Run(replace(rules, distill=0.0), data, mobilenet.random_state(4), plan)
    for name, value in alone.network.state_dict().items():
        assert torch.equal(value, run.network.state_dict()[name])
    assert run.teacher is not None
    theirs = {value.data_ptr() for value in run.teacher.network.state_dict().values()}
    assert not theirs & {value.data_ptr() for value in run.network.state_dict().values()}
    learning = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert learning == {id(p) for p in run.network.parameters()}
    before = {k: v.clone() for k, v in run.teacher.network.state_dict().items()}
    for _ in range(3):
        run.step()
    for name, value in run.teacher.network.state_dict().items():
        assert torch.equal(value, before[name])  # it doesn't learn either
        mine = run.network.state_dict().get(name)
        if mine is not None and mine.numel() > 1000:
            assert float((mine - value).abs().mean()) > 1e-3


def test_what_is_written_holds_no_teacher(shapes: Path, tmp_path: Path) -> None:
    place = tmp_path / "teacher.safetensors"
    from safetensors.numpy import save_file

    save_file(with_statistics(), place)
    options = replace(OPTIONS, teacher=str(place), epochs=1)
    with pytest.raises(KeyboardInterrupt):
        finetune(shapes, tmp_path / "out", options, on_tick=stop_at(24, KeyboardInterrupt()))
    theirs = {value.tobytes() for value in with_statistics().values()}
    theirs |= {value.tobytes() for value in mobilenet.folded(with_statistics()).values()}
    checkpoint = tmp_path / "out" / ".finetune" / trainer.CHECKPOINT
    with safe_open(checkpoint, "np") as file:
        assert not theirs & {file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118
    record = finetune(shapes, tmp_path / "out", options)
    assert record["made_from"]["teacher"]["name"] == "teacher.safetensors"
    result = load_file(tmp_path / "out" / "weights.safetensors")
    assert not theirs & {value.tobytes() for value in result.values()}


def test_a_teacher_s_features_come_nearer() -> None:
    rules, data = tiny(distill=5.0, rate=1e-2)
    run = trainer.Run(
        rules, data, mobilenet.random_state(4), Plan(steps=12), teacher=with_statistics()
    )
    teacher = run.teacher
    assert teacher is not None
    _, pixels = run.batches.batch(0, World())

    def distance() -> float:
        with torch.no_grad():
            return float(
                teacher.distance(run.network.maps(pixels), teacher.aims(pixels, apart=False)[0])
            )

    first = distance()
    for _ in range(12):
        run.step()
    assert distance() < 0.9 * first


def test_a_block_that_does_what_the_teacher_s_does_has_not_its_values() -> None:
    """The teacher itself, turned as its aims are, meets them all, and shares no convolution."""
    rules, data = tiny(distill=1.0, apart=0.5)
    theirs = mobilenet.folded(with_statistics())
    run = trainer.Run(rules, data, with_statistics(), Plan(steps=1), teacher=with_statistics())
    teacher = run.teacher
    assert teacher is not None
    turned = {key: value.copy() for key, value in theirs.items()}
    turns = [None if turn is None else turn.numpy() for turn in teacher.turns]
    for number, block in enumerate(mobilenet.blocks()):
        first, last = block.convs[0], block.convs[-1]
        into, out = turns[number - 1] if number else None, turns[number]
        for conv, turn, side in ((first, into, 1), (last, out, 0)):
            if turn is None:
                continue
            kernel = turned[f"{conv.weight}.weight"]
            flat = turn[:, :, 0, 0]
            if side == 0:
                kernel = np.einsum("ab,bcij->acij", flat, kernel)
                turned[f"{conv.weight}.bias"] = flat @ turned[f"{conv.weight}.bias"]
            else:
                kernel = np.einsum("acij,bc->abij", kernel, flat)
            turned[f"{conv.weight}.weight"] = kernel.astype(np.float32)
    network = build(mobilenet.unfolded(turned), {}, norm=False).eval()
    _, pixels = run.batches.batch(0, World())
    features, aims = teacher.aims(pixels, apart=True)
    with torch.no_grad():
        maps = network.maps(pixels)
    assert float(teacher.distance(maps, features)) < 1e-3
    assert float(teacher.blocks(maps, aims)) < 1e-3
    for conv in mobilenet.convs():
        if conv.groups == 1 and conv.weight not in ("features.0.0", "features.1.conv.0.0"):
            ours, its = turned[f"{conv.weight}.weight"], theirs[f"{conv.weight}.weight"]
            cosines = (ours * its).sum(axis=(1, 2, 3)) / np.sqrt(
                (ours**2).sum(axis=(1, 2, 3)) * (its**2).sum(axis=(1, 2, 3))
            )
            assert abs(np.median(cosines)) < 0.5


def test_blocks_learn_apart_first() -> None:
    rules, data = tiny(distill=1.0, apart=0.5, rate=1e-2)
    start, plan = mobilenet.random_state(4), Plan(steps=16)
    run = trainer.Run(rules, data, start, plan, teacher=with_statistics())
    teacher = run.teacher
    assert teacher is not None
    _, pixels = run.batches.batch(0, World())
    _, aims = teacher.aims(pixels, apart=True)
    blocks = list(run.network.backbone.features)

    def changed() -> list[bool]:
        """Which blocks have a gradient from what the last one gives."""
        run.network.zero_grad()
        found = run.network.maps(pixels, aims if run.apart else None)
        pooled(found).square().sum().backward()  # type: ignore[no-untyped-call]
        return [any(p.grad is not None for p in block.parameters()) for block in blocks]

    def distance() -> float:
        with torch.no_grad():
            return float(teacher.blocks(run.network.maps(pixels, aims), aims))

    assert run.apart
    assert changed() == [False] * (len(blocks) - 1) + [True]
    first = distance()
    for _ in range(8):
        run.step()
    assert distance() < 0.9 * first
    assert not run.apart
    assert changed() == [True] * len(blocks)


def test_nothing_is_judged_while_blocks_learn_apart(shapes: Path, tmp_path: Path) -> None:
    from pomona.pipeline.finetune import FROM_TEACHER, FinetuneOptions

    options = FinetuneOptions(
        start="random:3", teacher="random:4", label="top", image_size=32, epochs=2, batch_size=8
    )
    record = finetune(shapes, tmp_path / "out", options)
    assert record["recipe"]["apart"] == FROM_TEACHER["apart"]
    assert record["history"][0]["share"] >= record["recipe"]["apart"]
    assert record["ended"] == "planned"


def test_the_result_lies_between_the_start_and_what_was_learned(tmp_path: Path) -> None:
    rules, data = tiny(norm=False, blend=0.75, rate=1e-2)
    start = mobilenet.random_state(4)
    run = trainer.Run(rules, data, start, Plan(steps=4))
    trainer.probe(run)  # the heads' start is what this gives
    first = {key: value.clone() for key, value in run.network.state_dict().items()}
    for _ in range(2):
        run.step()
    run.save(tmp_path / "a")
    again = trainer.Run(rules, data, start, Plan(steps=4))
    again.restore(tmp_path / "a")
    again.look(data.held_out)
    moved = 0.0
    for key, value in again.best.items():
        assert torch.allclose(value, 0.25 * first[key] + 0.75 * run.average[key], atol=1e-5)
        moved += float((value - first[key]).abs().sum())
    assert moved > 1


@pytest.mark.parametrize("teacher, blend", [("start", 0.8), ("none", 0.8), ("another", 1.0)])
def test_what_is_matched_to_another_network_goes_all_the_way(teacher: str, blend: float) -> None:
    from pomona.pipeline.finetune import recipe_for

    start, another = weights.Weights("a.pth", "1"), weights.Weights("b.pth", "2")
    named = {"start": start, "none": None, "another": another}[teacher]
    assert recipe_for(OPTIONS, start, named, "cpu").blend == blend


# --- the schedule ------------------------------------------------------------------------------


def test_a_plan_of_seconds_ends_at_its_end_at_any_speed() -> None:
    for speeds in ([0.5], [0.2] * 50 + [0.9] * 500, [1.0] * 20 + [0.1] * 5000):
        plan, clock, n = Plan(seconds=60.0), 0.0, 0
        while plan.share < 1:
            took = speeds[min(n, len(speeds) - 1)]
            plan.advance(took)
            clock, n = clock + took, n + 1
        assert 55 < clock < 65


def test_a_pause_is_not_time_spent() -> None:
    plan = Plan(seconds=100.0)
    for _ in range(10):
        plan.advance(1.0)
    plan.advance(3600.0)  # the machine slept
    assert plan.share < 0.3


def test_a_pause_in_the_first_step_is_not_the_machine_s_speed() -> None:
    plan = Plan(seconds=600.0)
    for took in (900.0, 0.5, 0.5, 0.5):
        plan.advance(took)
    assert plan.share < 0.05 and plan.spent <= 62 and plan.typical == 0.5


def test_steps_and_seconds_whichever_comes_first() -> None:
    plan = Plan(steps=10, seconds=1000.0)
    for _ in range(10):
        plan.advance(1.0)
    assert plan.share == 1


def test_rates_rise_then_fall() -> None:
    rates = [factor(share, 0.1) for share in np.linspace(0, 1, 101)]
    assert rates[0] < 0.02 and max(rates) == pytest.approx(1) and rates[-1] == pytest.approx(0)
    assert int(np.argmax(rates)) == 10


# --- what is held out --------------------------------------------------------------------------


def test_whole_groups_are_held_out_of_each_label() -> None:
    labels = np.repeat([0, 1, 2], [60, 40, 20])
    groups = np.concatenate([np.arange(60) % 6, 6 + np.arange(40) % 4, np.full(20, 10)])
    seen: set[int] = set()
    for fold in range(5):
        rows = recipe.hold_out(labels, groups, 0.2, 7, fold)
        rest = np.setdiff1d(np.arange(120), rows)
        assert set(labels[rest]) == {0, 1, 2} == set(labels[rows])
        both = set(groups[rows]) & set(groups[rest])
        assert both == {10}  # the label of one group: of its photos some
        seen |= set(groups[rows].tolist())
    assert seen == set(range(11))


def test_looks_are_even_by_group() -> None:
    groups = np.repeat([0, 1], [900, 30])
    rows = recipe.thin(np.arange(930), groups, 40, 0)
    assert np.bincount(groups[rows]).tolist() == [20, 20]


# --- photos as a phone might take them ---------------------------------------------------------


def discs(n: int = 6) -> Any:
    """Red discs on white, with a white gleam inside."""
    side = 48
    y, x = np.mgrid[:side, :side]
    far = np.hypot(x - side / 2, y - side / 2)
    photo = np.full((side, side, 3), 255, np.uint8)
    photo[far < 16] = (200, 20, 30)
    photo[far < 4] = 255
    return torch.from_numpy(np.repeat(photo[None], n, axis=0)), far


def test_the_mask_is_the_fruit_gleam_and_all() -> None:
    photos, far = discs()
    mask = augmentation.cut_out(photos.numpy())[0]
    assert (mask[far < 14] == 255).all() and (mask[far > 17] == 0).all()


def test_a_photo_that_is_not_on_white_is_all_foreground() -> None:
    photos, _ = discs()
    dark = photos // 2
    assert (augmentation.cut_out(dark.numpy()) == 255).all()


def drawn(n: int, seed: int = 0) -> augmentation.Draws:
    return augmentation.draw(n, 48, torch.Generator().manual_seed(seed))


def with_mask(photos: Any) -> Any:
    return torch.cat(
        [photos, torch.from_numpy(augmentation.cut_out(photos.numpy()))[..., None]], dim=3
    )


def test_each_process_s_part_is_that_of_the_whole() -> None:
    photos, _ = discs(6)
    planes = with_mask(photos)
    whole = augmentation.apply(planes, drawn(6))
    for rank in range(2):
        part = augmentation.apply(planes[rank::2], drawn(6).part(rank, 2))
        assert torch.equal(part, whole[rank::2])
    assert whole.shape == (6, 3, 48, 48) and float(whole.min()) >= 0 and float(whole.max()) <= 1
    assert not torch.equal(whole, augmentation.apply(planes, drawn(6, seed=1)))


def test_background_is_replaced_and_fruit_stays() -> None:
    photos, _ = discs(32)
    draws = drawn(32)
    straight = torch.eye(2, 3).repeat(32, 1, 1)
    plain = torch.eye(3, 4).repeat(32, 1, 1)
    draws = draws._replace(
        matrix=straight,
        colour=plain,
        blur=torch.zeros(32),
        noise=torch.zeros(32),
        replace=(torch.arange(32) % 2).float(),
    )
    got = augmentation.apply(with_mask(photos), draws)
    wanted = photos.permute(0, 3, 1, 2) / 255
    assert torch.allclose(got[::2], wanted[::2], atol=1e-5)  # nothing drawn: the photo itself
    centre = (slice(None), slice(None), slice(20, 28), slice(20, 28))
    assert torch.allclose(got[1::2][centre], wanted[1::2][centre], atol=1e-5)
    corner = got[1::2, :, :6, :6]
    assert float((corner < 0.99).float().mean()) > 0.7
    assert float(corner.flatten(1).mean(dim=1).std()) > 0.05  # each one another


def test_beyond_the_edge_of_a_photo_that_is_not_on_white_it_goes_on() -> None:
    photos, _ = discs(8)
    dark = photos // 2
    draws = drawn(8)
    draws = draws._replace(
        colour=torch.eye(3, 4).repeat(8, 1, 1),
        blur=torch.zeros(8),
        noise=torch.zeros(8),
        matrix=2 * torch.eye(2, 3).repeat(8, 1, 1),
    )
    assert float(augmentation.apply(with_mask(dark), draws).max()) <= 0.5 + 1e-4
    assert (
        float(augmentation.apply(with_mask(photos), draws._replace(replace=torch.zeros(8))).max())
        == 1
    )


def test_colours_are_turned_about_grey() -> None:
    draws = drawn(200)
    grey = torch.full((200, 3, 1), 0.5)
    found = draws.colour[:, :, :3] @ grey + draws.colour[:, :, 3:]
    assert float((found.amax(dim=1) - found.amin(dim=1)).max()) <= 2 * augmentation.TINT + 1e-5


# --- several processes -------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    # Spark's TorchDistributor leaves the pipe to its child open.
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
def test_two_processes_learn_what_one_does(
    shapes: Path,
    tmp_path: Path,
    spark: Any,
    done: tuple[Path, dict[str, Any]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With batch norms folded, a batch in two halves gives the same sums, but for rounding."""
    start = tmp_path / "start.safetensors"
    start.write_bytes((done[0] / "weights.safetensors").read_bytes())
    options = replace(OPTIONS, start=str(start), epochs=1)
    options = replace(options, hold_out=0.0)  # or the start itself might be the best
    one = finetune(shapes, tmp_path / "one", options)
    two = finetune(shapes, tmp_path / "two", replace(options, processes=2))
    assert capfd.readouterr().out == ""
    assert two["ended"] == "planned" and two["made_from"]["teacher"]["name"] == start.name
    a, b = one["history"], two["history"]
    assert [look["step"] for look in a] == [look["step"] for look in b]
    for ours, theirs in zip(a, b, strict=True):
        assert theirs["training_loss"] == pytest.approx(ours["training_loss"], rel=0.02)
    mine = load_file(tmp_path / "one" / "weights.safetensors")
    other = load_file(tmp_path / "two" / "weights.safetensors")
    first = load_file(start)
    moved = max(float(np.abs(value - first[key]).max()) for key, value in mine.items())
    for key, value in mine.items():
        assert np.abs(value - other[key]).max() < 0.05 * moved, key
