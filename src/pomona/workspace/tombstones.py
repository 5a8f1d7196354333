"""Tombstones: keyed digests of the paths of photos that must never be taken in again.

``OUT/forgotten/tombstones.json`` and its copy hold no path: a path may itself be personal data. The
digest is BLAKE2b (RFC 7693) with a random key, which is stored beside it. Without the key the
digests reveal nothing; with it, whoever guesses a path can check the guess (docs/privacy.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pomona.core.errors import DamagedError, RequestError
from pomona.core.files import FORMAT, read_json, write_json
from pomona.workspace.layout import Out

KEY_BYTES, ID_BYTES = 32, 16
"""With 128 bits, one of a billion paths matches wrongly with a chance of about 1 in 10^20."""


@dataclass(frozen=True)
class Tombstones:
    """The forgotten photos of one OUT."""

    key: bytes  # the random key of the digest, this OUT's own
    ids: frozenset[bytes] = frozenset()  # the digests of the photos' paths

    def id_of(self, path: str) -> bytes:
        """Return the digest of a path."""
        return hashlib.blake2b(path.encode(), digest_size=ID_BYTES, key=self.key).digest()

    def held(self, paths: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Return a mask of the paths that are forgotten. Takes about a microsecond a path."""
        if not self.ids:
            return pa.repeat(pa.scalar(False), len(paths))
        return pa.array([self.id_of(path) in self.ids for path in paths.to_pylist()], pa.bool_())

    def having(self, paths: Iterable[str]) -> Tombstones:
        """Return a copy with more paths."""
        return replace(self, ids=self.ids | {self.id_of(path) for path in paths})

    def lacking(self, paths: Iterable[str]) -> Tombstones:
        """Return a copy with fewer paths."""
        return replace(self, ids=self.ids - {self.id_of(path) for path in paths})


FILES = ("forgotten/tombstones.json", "forgotten/tombstones-copy.json")
"""In OUT, both with the same content: without it forgotten photos would come back, so one damaged
file must not lose it. The first counts."""


def read(out: Out) -> Tombstones:
    """Read the tombstones. Before the first forget there are none, and the key is a new one.

    Raises DamagedError if they are lost.
    """
    files = [out.root / name for name in FILES]
    for file in files:
        with contextlib.suppress(DamagedError, KeyError, ValueError, TypeError):
            about = read_json(file)
            ids = frozenset(bytes.fromhex(text) for text in about["ids"])
            return Tombstones(bytes.fromhex(about["key"]), ids)
    if any(file.exists() for file in files) or any(out.forgotten.glob("receipt-*.json")):
        raise DamagedError(
            f"{files[0]} is lost or damaged, and without it forgotten photos would come back: put "
            "it back from a backup, or from a place that OUT was pushed to; it is the same in all"
        )
    return Tombstones(secrets.token_bytes(KEY_BYTES))


def write(path: Path, tombstones: Tombstones) -> None:
    """Write tombstones to one of `FILES`, or to what will become one."""
    about = {
        "format": FORMAT,
        "method": f"blake2b-{8 * ID_BYTES}, keyed",
        "key": tombstones.key.hex(),
        "ids": sorted(digest.hex() for digest in tombstones.ids),
    }
    write_json(path, about)


def leave_out(out: Out, photos: pa.Table) -> tuple[pa.Table, int]:
    """Return the photos of a listing that aren't forgotten, and the number that are."""
    tombstones = read(out)
    if not tombstones.ids:
        return photos, 0
    kept = photos.filter(pc.invert(tombstones.held(photos["path"])))
    return kept, photos.num_rows - kept.num_rows


def pending_file(out: Out) -> Path:
    """Return the path of the file that exists while a forget is unfinished. It names no photo."""
    return out.forgotten / "pending.json"


def pending(out: Out) -> dict[str, Any]:
    """Return the state of an unfinished forget (``phase`` and more), or {}."""
    remedy = "remove it, and run the same pomona forget again, with its paths"
    return read_json(pending_file(out), remedy)


def refuse_erasing(out: Out) -> None:
    """Raise RequestError if a forget was killed before it erased its rows: nothing may use them."""
    if pending(out).get("phase") == "erase":
        raise RequestError(
            f"pomona forget isn't finished in {out.root}: pomona forget --out … alone ends it"
        )


def total(out: Out) -> int:
    """Return the number of forgotten photos."""
    return len(read(out).ids)
