"""Who made a model: a signature beside its files, and the refusal of all others."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors.numpy import load_file, save_file

from pomona.core.errors import MismatchError, MissingError, RequestError
from pomona.model import artifact, signature
from tests.broken_models import sealed, whole
from tests.conftest import photo
from tests.keys import Keys, make_keys

pytest.importorskip("model_signing.signing", reason="needs the extra signing")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"), "mine")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"), "theirs")


@pytest.fixture
def signed(tmp_path: Path, keys: Keys) -> Path:
    folder = whole(tmp_path / "model")
    signature.sign(folder, artifact.load_model(folder).files, keys.private)
    return folder


def test_a_signed_model_loads_and_is_what_was_signed(signed: Path, keys: Keys) -> None:
    model = artifact.load_model(signed, verify=keys.public)
    assert model.about == artifact.load_model(signed).about
    names = [path.name for path in signed.iterdir()]
    assert sorted(names) == ["classifier.safetensors", "model.json", "model.onnx", "model.sig"]
    assert str(signed.parent) not in (signed / "model.sig").read_text()
    (signed / "README.md").write_text("beside it")  # not of the model
    artifact.load_model(signed, verify=keys.public)


@pytest.mark.parametrize("name", ["model.json", "model.onnx", "classifier.safetensors"])
def test_whoever_changes_a_file_and_its_digests_is_found_out(
    signed: Path, keys: Keys, name: str
) -> None:
    if name == "model.json":
        about = json.loads((signed / name).read_text())
        (signed / name).write_text(json.dumps({**about, "labels": about["labels"][::-1]}))
    elif name == "model.onnx":
        proto = onnx.load(signed / name)
        proto.producer_name = "another"
        (signed / name).write_bytes(proto.SerializeToString())
    else:
        tensors = load_file(signed / name)
        save_file({**tensors, "bias": -tensors["bias"]}, signed / name)
    sealed(signed)
    artifact.load_model(signed)  # the digests say nothing
    with pytest.raises(MismatchError, match=r"model\.sig is no signature by .* of this model"):
        artifact.load_model(signed, verify=keys.public)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[" * 100_000, None, "theirs"])
def test_no_signature_or_anothers(
    signed: Path, keys: Keys, others: Keys, content: bytes | str | None
) -> None:
    file = signed / "model.sig"
    rule = r"model\.sig is no signature by"
    if content is None:
        file.unlink()
        rule = r"isn't signed \(there is no model\.sig\)"
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        signature.sign(signed, artifact.load_model(signed).files, others.private)
    with pytest.raises(MismatchError, match=rule) as told:
        artifact.load_model(signed, verify=keys.public)
    assert "\n" not in str(told.value)


def test_keys_that_cant_be_used(signed: Path, keys: Keys, tmp_path: Path) -> None:
    files = artifact.load_model(signed).files
    other = make_keys(tmp_path, "rsa", kind="rsa")
    nowhere = str(tmp_path / "no.pem")
    for key in (nowhere, keys.public, other.private, str(signed / "model.json")):
        with pytest.raises(RequestError, match="it is a private EC key as PEM"):
            signature.sign(signed, files, key)
    for key in (nowhere, keys.private, other.public, str(signed / "model.json")):
        with pytest.raises(RequestError, match="it is the file of a public EC key as PEM"):
            artifact.load_model(signed, verify=key)
    artifact.load_model(signed, verify=keys.public)  # the signature that was there stays


def test_a_key_with_a_password(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = artifact.load_model(signed).files
    locked = make_keys(tmp_path, "locked", password="hush")
    with pytest.raises(RequestError, match="POMONA_KEY_PASSWORD"):
        signature.sign(signed, files, locked.private)
    monkeypatch.setenv("POMONA_KEY_PASSWORD", "hush")
    signature.sign(signed, files, locked.private)
    artifact.load_model(signed, verify=locked.public)


def test_an_identity_needs_its_issuer_and_a_network(
    signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model_signing import verifying

    asked: list[dict[str, str]] = []

    def offline(self: Any, **settings: str) -> None:
        asked.append(settings)
        raise OSError("no network")

    monkeypatch.setattr(verifying.Config, "use_sigstore_verifier", offline)
    workflow = "https://github.com/o/r/.github/workflows/train.yml@refs/heads/main"
    for identity in ("me@example.org", workflow):
        with pytest.raises(RequestError, match=r"\(no network\).*needs a network"):
            artifact.load_model(signed, verify=f"{identity}@https://issuer.example")
    issuer = "https://issuer.example"
    assert asked == [
        {"identity": "me@example.org", "oidc_issuer": issuer},
        {"identity": workflow, "oidc_issuer": issuer},
    ]


def test_the_standards_own_tool_agrees(signed: Path, keys: Keys, others: Keys) -> None:
    def ask(key: str) -> int:
        words = ["verify", "key", str(signed), "--signature", str(signed / "model.sig")]
        words += ["--public_key", key, "--ignore-paths", str(signed / "model.sig")]
        run = subprocess.run(
            [sys.executable, "-m", "model_signing", *words], capture_output=True, check=False
        )
        return run.returncode

    assert (ask(keys.public), ask(others.public) != 0) == (0, True)


def test_without_the_package(signed: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing.verifying", None)
    with pytest.raises(MissingError, match=r"pip install 'pomona\[signing\]'"):
        artifact.load_model(signed, verify=keys.public)


def test_the_commands(tmp_path: Path, keys: Keys, others: Keys, command: Any) -> None:
    folder = whole(tmp_path / "model")
    (tmp_path / "photo.jpg").write_bytes(photo())
    asked = ("predict", tmp_path / "photo.jpg", "--model", folder, "--json", "--verify")
    code, _, errors = command(*asked, keys.public)
    assert code == 2 and "isn't signed" in errors and len(errors.splitlines()) == 1
    code, output, errors = command("sign", folder, "--key", keys.private, "--json")
    assert code == 0, errors
    assert json.loads(output)["signature"] == str(folder / "model.sig")
    code, output, errors = command(*asked, keys.public)
    assert (code, errors) == (0, "")
    assert json.loads(output)["label"] is not None
    code, output, errors = command(*asked, others.public)
    assert (code, output) == (2, "") and len(errors.splitlines()) == 1
    shutil.rmtree(folder)
    code, _, errors = command("sign", folder, "--key", keys.private)
    assert code == 2 and "there is no model in" in errors


def test_serve_starts_only_with_a_signed_model(
    tmp_path: Path, others: Keys, signed: Path, command: Any
) -> None:
    pytest.importorskip("fastapi")
    words = ("serve", "--port", 0, "--model", signed, "--verify", others.public)
    code, _, errors = command(*words)
    assert code == 2
    assert "is no signature by" in errors.splitlines()[-1]
