from __future__ import annotations

import hashlib
import http.server
import io
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pomona.backbone import mobilenet, weights
from pomona.backbone.spec import make_spec
from pomona.core.errors import PomonaError, RequestError, WeightsError


def test_keys_and_shapes_are_torchvisions() -> None:
    shapes = mobilenet.shapes()
    assert len(shapes) == 52 * 5  # 52 convolutions, each with a batch norm of four tensors
    assert shapes["features.0.0.weight"] == (32, 3, 3, 3)
    assert shapes["features.1.conv.0.0.weight"] == (32, 1, 3, 3)
    assert shapes["features.17.conv.3.running_var"] == (320,)
    assert shapes["features.18.0.weight"] == (1280, 320, 1, 1)


def test_random_weights_repeat() -> None:
    one, two = weights.load_weights("random:3"), weights.load_weights("random:3")
    assert one.digest == two.digest != weights.load_weights("random:4").digest
    assert not one.trained


def test_the_package_s_own_weights_are_float16_with_a_name(tmp_path: Path) -> None:
    state = mobilenet.unfolded(mobilenet.folded(mobilenet.random_state(1)))
    half = {key: value.astype(np.float16) for key, value in state.items()}
    save_file(half, tmp_path / "fruits.safetensors")
    loaded = weights.fruits(tmp_path / "fruits.safetensors")
    assert loaded.name == "fruits" and loaded.trained
    assert loaded.state is not None
    assert all(value.dtype == np.float32 for value in loaded.state.values())
    with pytest.raises(WeightsError, match=r"holds no weights of its own: set POMONA_WEIGHTS"):
        weights.fruits(tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", ["random:", "random:x", "random:-1", "random:1.5"])
def test_random_needs_a_seed(name: str) -> None:
    with pytest.raises(WeightsError, match="random:SEED"):
        weights.load_weights(name)


def test_the_same_values_in_any_format(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    state = mobilenet.random_state(0)
    save_file(dict(state), tmp_path / "w.safetensors")
    torch.save({k: torch.from_numpy(v) for k, v in state.items()}, tmp_path / "w.pth")
    both = [weights.load_weights(str(tmp_path / name)) for name in ("w.safetensors", "w.pth")]
    assert {w.digest for w in both} == {weights.load_weights("random:0").digest}
    assert all(w.trained for w in both)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    state = dict(mobilenet.random_state(0))
    del state["features.3.conv.1.1.bias"], state["features.9.conv.1.1.bias"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"no key features\.3\.conv\.1\.1\.bias"):
        weights.load_weights(str(tmp_path / "w.safetensors"))


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    state = dict(mobilenet.random_state(0))
    state["features.2.conv.3.weight"] = np.zeros(7, np.float32)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"features\.2\.conv\.3\.weight has shape \[7\], expec"):
        weights.load_weights(str(tmp_path / "w.safetensors"))


def test_nan_is_refused(tmp_path: Path) -> None:
    state = dict(mobilenet.random_state(0))
    state["features.18.1.bias"] = np.full(1280, np.nan, np.float32)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"features\.18\.1\.bias holds values"):
        weights.load_weights(str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".onnx"])
def test_damaged_files_are_refused(tmp_path: Path, suffix: str) -> None:
    if suffix == ".pth":
        pytest.importorskip("torch")
    path = tmp_path / f"w{suffix}"
    path.write_bytes(b"not weights" * 100)
    with pytest.raises(WeightsError, match="damaged"):
        make_spec(weights.load_weights(str(path)))


def test_a_pth_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (partial(Path.touch), (str(tmp_path / "ran"),))

    torch.save({"features.0.0.weight": Evil()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError):
        weights.load_weights(str(tmp_path / "w.pth"))
    assert not (tmp_path / "ran").exists()


def test_no_file_and_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="POMONA_WEIGHTS"):
        weights.load_weights(str(tmp_path / "no.safetensors"))
    (tmp_path / "w.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"\.safetensors, \.pth or \.onnx"):
        weights.load_weights(str(tmp_path / "w.bin"))


def test_the_default_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights.default() == "imagenet"
    monkeypatch.setenv("POMONA_WEIGHTS", "random:7")
    assert weights.load_weights().name == "random:7"


def test_onnx_weights_go_round(tmp_path: Path) -> None:
    loaded = weights.load_weights("random:0")
    assert loaded.state is not None
    path = tmp_path / "w.onnx"
    path.write_bytes(mobilenet.to_onnx(loaded.state, 96, loaded.name, loaded.digest))
    spec = make_spec(weights.load_weights(str(path)), image_size=96)
    assert spec.payload == path.read_bytes()
    with pytest.raises(WeightsError, match="224, 224"):
        make_spec(weights.load_weights(str(path)))
    with pytest.raises(RequestError, match="--backend onnx"):
        make_spec(weights.load_weights(str(path)), image_size=96, backend="torch")


# --- the official file, from a server of the test's own ----------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "server"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}", folder
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def official(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """The official file on the server, and its place in the cache, which is empty."""
    torch = pytest.importorskip("torch")
    url, folder = server
    file = io.BytesIO()
    torch.save({k: torch.from_numpy(v) for k, v in mobilenet.random_state(5).items()}, file)
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    name = f"mobilenet_v2-{digest[:8]}.pth"
    (folder / name).write_bytes(file.getvalue())
    monkeypatch.setattr(weights, "OFFICIAL_URL", f"{url}/{name}")
    monkeypatch.setattr(weights, "OFFICIAL_SHA256", digest)
    monkeypatch.setenv("POMONA_CACHE", str(tmp_path / "cache"))
    return folder / name, tmp_path / "cache" / name


def test_the_official_file_is_fetched_once(official: tuple[Path, Path]) -> None:
    served, cached = official
    seen: list[tuple[int, int]] = []
    loaded = weights.load_weights("imagenet", lambda done, total: seen.append((done, total)))
    assert loaded.digest == weights.load_weights("random:5").digest
    assert loaded.name == "imagenet"
    assert seen[-1][0] == seen[-1][1] == served.stat().st_size
    served.unlink()
    assert weights.load_weights("imagenet").digest == loaded.digest
    assert list(cached.parent.iterdir()) == [cached]


@pytest.mark.parametrize("damage", ["empty", "cut", "one byte"])
def test_a_damaged_official_file_in_the_cache_is_fetched_again(
    official: tuple[Path, Path], damage: str
) -> None:
    served, cached = official
    right = served.read_bytes()
    wrong = {"empty": b"", "cut": right[:5000], "one byte": right[:-1] + b"?"}[damage]
    cached.parent.mkdir()
    cached.write_bytes(wrong)
    assert weights.load_weights("imagenet").digest == weights.load_weights("random:5").digest
    assert cached.read_bytes() == right


def test_a_changed_official_file_is_refused(
    official: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cached = official
    # The first digits of the sha256 fit: a forger makes such a file in seconds.
    whole = weights.OFFICIAL_SHA256
    monkeypatch.setattr(weights, "OFFICIAL_SHA256", whole[:8] + whole[:7:-1])
    with pytest.raises(WeightsError, match="sha256 differs"):
        weights.load_weights("imagenet")
    assert not list(cached.parent.iterdir())


def test_the_official_digest_is_that_of_the_name() -> None:
    assert weights.OFFICIAL_URL.endswith(f"-{weights.OFFICIAL_SHA256[:8]}.pth")
    assert len(weights.OFFICIAL_SHA256) == 64


def test_no_network_names_the_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "OFFICIAL_URL", "http://127.0.0.1:9/mobilenet_v2-00000000.pth")
    monkeypatch.setenv("POMONA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(PomonaError) as caught:
        weights.load_weights("imagenet")
    for remedy in ("POMONA_WEIGHTS", "cache folder", "random:0"):
        assert remedy in str(caught.value)
