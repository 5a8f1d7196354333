"""Keys to sign models with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Keys(NamedTuple):
    private: str
    public: str


def make_keys(folder: Path, name: str, password: str | None = None, kind: str = "ec") -> Keys:
    """Write a pair of keys as PEM, as openssl does."""
    pytest.importorskip("model_signing.signing", reason="needs the extra signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    key: Any = (
        ec.generate_private_key(ec.SECP256R1())
        if kind == "ec"
        else rsa.generate_private_key(65537, 2048)
    )
    lock: Any = serialization.NoEncryption()
    if password:
        lock = serialization.BestAvailableEncryption(password.encode())
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / f"{name}.pem").write_bytes(key.private_bytes(pem, pkcs8, lock))
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    (folder / f"{name}.pub").write_bytes(key.public_key().public_bytes(pem, public))
    return Keys(str(folder / f"{name}.pem"), str(folder / f"{name}.pub"))
