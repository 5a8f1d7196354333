"""Signatures of models, by OpenSSF's model signing standard (extra ``signing``).

``model.sig`` beside a model's files is a Sigstore bundle with the sha256 of each of them, signed
with a key (ECDSA on P-256, P-384 or P-521), or by an identity that Sigstore vouched for. Digests
show that a file was damaged; a signature shows who made it. Any tool of the standard can read it
(``model_signing verify``).
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pomona.core.errors import MismatchError, MissingError, RequestError, first_line
from pomona.core.files import atomic_file

NAME = "model.sig"
PASSWORD = "POMONA_KEY_PASSWORD"
"""Environment variable: the password of the private key, if it has one."""


def sign(folder: Path, files: Mapping[str, bytes], key: str) -> Path:
    """Sign a model's files, as `pomona.model.artifact.Model.files`, and return ``model.sig``.

    ``key`` is a file with a private key as PEM; its password comes from ``POMONA_KEY_PASSWORD``.

    Raises
    ------
    RequestError
        If there is no such key, or it is of another kind.
    MissingError
        If the extra ``signing`` isn't installed.
    """
    config = _library("signing").Config()
    password = os.environ.get(PASSWORD)
    try:
        # cryptography takes the password as bytes, whatever the annotation says.
        config.use_elliptic_key_signer(
            private_key=key, password=password.encode() if password else None
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RequestError(
            f"the key {key} can't be used to sign ({_reason(error)}): it is a private EC key as "
            f"PEM, with its password in {PASSWORD} if it has one (docs/model.md makes one)"
        ) from error
    with _written(files) as copy, atomic_file(folder / NAME) as part:
        config.sign(copy, part)
    return folder / NAME


def verify(files: Mapping[str, bytes], signature: Path, by: str) -> None:
    """Check that a signer signed exactly these files.

    Parameters
    ----------
    files
        Names and bytes, as they were read: what is on disk may change.
    signature
        The file ``model.sig``.
    by
        A file with a public key as PEM, or ``IDENTITY@ISSUER`` (an e-mail address or a workflow's
        address, and the https:// address of who vouched for it), which needs a network.

    Raises
    ------
    MismatchError
        If there is no signature, or it isn't the signer's, or it is of other files.
    RequestError
        If there is no such key.
    MissingError
        If the extra ``signing`` isn't installed.
    """
    config = _verifier(by)
    if not signature.is_file():
        raise MismatchError(
            f"the model in {signature.parent} isn't signed (there is no {NAME}), and --verify asks "
            "for it: pomona sign MODEL --key KEY signs one"
        )
    # The library prints warnings to standard output, where answers go.
    with _written(files) as copy, contextlib.redirect_stdout(sys.stderr):
        try:
            config.verify(copy, signature)
        except Exception as error:  # of five libraries, on a file that may hold anything
            raise MismatchError(
                f"{signature} is no signature by {by} of this model: get the model again from who "
                "signed it, or ask for their present key"
            ) from error


def _verifier(by: str) -> Any:
    config = _library("verifying").Config()
    identity, at, issuer = by.rpartition("@https://")
    try:
        if at:
            return config.use_sigstore_verifier(identity=identity, oidc_issuer=f"https://{issuer}")
        return config.use_elliptic_key_verifier(public_key=by)
    except Exception as error:  # of the key's file, or of Sigstore's trust root, which is fetched
        raise RequestError(
            f"--verify {by} can't be used ({_reason(error)}): it is the file of a public EC key as "
            "PEM, or IDENTITY@https://ISSUER, which needs a network"
        ) from error


def _reason(error: Exception) -> str:
    """Return an error's text in brief; the library asks a key for its curve before its kind."""
    return "another kind of key" if isinstance(error, AttributeError) else first_line(error)[:200]


@contextlib.contextmanager
def _written(files: Mapping[str, bytes]) -> Iterator[Path]:
    """Yield a folder with these files and no others: the library reads from disk."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "model")
        copy.mkdir()
        for name, content in files.items():
            (copy / name).write_bytes(content)
        yield copy


def _library(module: str) -> Any:
    try:
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise MissingError(
            f"signatures need the package model-signing ({error.name} isn't here): "
            "pip install 'pomona[signing]'"
        ) from error
    return getattr(model_signing, module)
