"""Photos that are never taken in again, known by keyed digests of their paths.

``OUT/forgotten/tombstones.json`` holds no path: a path may itself be personal data. The digest is
BLAKE2b with a random key (RFC 7693), which lies beside it. Without the key the digests say nothing;
with it, whoever guesses a path can check the guess (docs/privacy.md).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pomona.core.errors import RequestError
from pomona.core.files import FORMAT, read_json, write_json
from pomona.workspace.layout import Out

KEY_BYTES, ID_BYTES = 32, 16
"""128 bits: among a billion paths a wrong match has a chance of about 1 in 10^20."""


@dataclass(frozen=True)
class Tombstones:
    """The ids of forgotten photos.

    Attributes
    ----------
    key
        Of the digest; random, of this OUT.
    ids
        Digests of paths.
    """

    key: bytes
    ids: frozenset[bytes] = frozenset()

    def id_of(self, path: str) -> bytes:
        """Return the digest of a path."""
        return hashlib.blake2b(path.encode(), digest_size=ID_BYTES, key=self.key).digest()

    def held(self, paths: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Tell for each path whether it is forgotten. About a microsecond for each."""
        if not self.ids:
            return pa.repeat(pa.scalar(False), len(paths))
        ids, key, digest = self.ids, self.key, hashlib.blake2b
        return pa.array(
            [
                digest(path.encode(), digest_size=ID_BYTES, key=key).digest() in ids
                for path in paths.to_pylist()
            ],
            pa.bool_(),
        )

    def having(self, paths: Iterable[str]) -> Tombstones:
        """Return them with more."""
        return replace(self, ids=self.ids | {self.id_of(path) for path in paths})

    def lacking(self, paths: Iterable[str]) -> Tombstones:
        """Return them with fewer."""
        return replace(self, ids=self.ids - {self.id_of(path) for path in paths})


def place(out: Out) -> Path:
    """Return the file."""
    return out.forgotten / "tombstones.json"


def read(out: Out) -> Tombstones:
    """Read the tombstones; none, under a new key, where there is no file."""
    found = read_json(place(out))
    if not found:
        return Tombstones(secrets.token_bytes(KEY_BYTES))
    ids = frozenset(bytes.fromhex(word) for word in found["ids"])
    return Tombstones(bytes.fromhex(found["key"]), ids)


def write(path: Path, found: Tombstones) -> None:
    """Write tombstones."""
    about = {
        "format": FORMAT,
        "method": f"blake2b-{8 * ID_BYTES}, keyed",
        "key": found.key.hex(),
        "ids": sorted(one.hex() for one in found.ids),
    }
    write_json(path, about)


def leave_out(out: Out, photos: pa.Table) -> tuple[pa.Table, int]:
    """Return the photos of a listing that aren't forgotten, and how many are."""
    found = read(out)
    if not found.ids:
        return photos, 0
    kept = photos.filter(pc.invert(found.held(photos["path"])))
    return kept, photos.num_rows - kept.num_rows


# --- a forget that isn't finished --------------------------------------------------------------


def pending_file(out: Out) -> Path:
    """Return the file that is there from the first step of a forget to its last. Holds no path."""
    return out.forgotten / "pending.json"


def pending(out: Out) -> dict[str, Any]:
    """Return ``phase`` and more of a forget that isn't finished, or {}."""
    return read_json(pending_file(out))


def refuse_erasing(out: Out) -> None:
    """Refuse to work on rows that are about to go.

    Raises
    ------
    RequestError
        If a forget was killed before the rows were erased.
    """
    if pending(out).get("phase") == "erase":
        raise RequestError(
            f"pomona forget isn't finished in {out.root}: pomona forget --out … alone ends it"
        )


def total(out: Out) -> int:
    """Return how many there are."""
    return len(read_json(place(out)).get("ids", []))
