"""The folder OUT: its names, its lock, changes that happen whole or not at all, its manifest."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomona.core.errors import BusyError, RequestError
from pomona.core.files import FORMAT, read_json, write_json
from pomona.core.provenance import versions
from pomona.core.uris import local_path, refuse_uri

OWN_FOLDERS = ("features", "training_pca", "test_pca", "projection", "model", "_work")
"""What a run replaces or removes in OUT: it must not be somebody else's."""


@dataclass(frozen=True)
class Out:
    """The places in OUT."""

    root: Path

    @property
    def features(self) -> Path:
        """The table of features."""
        return self.root / "features"

    @property
    def table_file(self) -> Path:
        """What made the table of features, and its files."""
        return self.features / "_table.json"

    @property
    def backbone(self) -> Path:
        """The network that made the features, as ONNX: training needs no weights of its own."""
        return self.features / "_backbone.onnx"

    @property
    def projection(self) -> Path:
        """Scaler and PCA."""
        return self.root / "projection"

    @property
    def model(self) -> Path:
        """The finished model."""
        return self.root / "model"

    @property
    def tuned(self) -> Path:
        """Weights that `pomona finetune` made."""
        return self.root / "weights.safetensors"

    @property
    def tuned_about(self) -> Path:
        """What made them, and how good they are."""
        return self.root / "weights.json"

    @property
    def tuning(self) -> Path:
        """A finetune that isn't finished: hidden, so that it is neither pushed nor a result."""
        return self.root / ".finetune"

    @property
    def report(self) -> Path:
        """Metrics, pictures and the page that shows them."""
        return self.root / "report"

    @property
    def metrics(self) -> Path:
        """All figures of the model."""
        return self.report / "metrics.json"

    @property
    def rejected(self) -> Path:
        """Photos without features, as CSV."""
        return self.root / "rejected.csv"

    @property
    def manifest(self) -> Path:
        """What ran."""
        return self.root / "manifest.json"

    @property
    def log(self) -> Path:
        """Spark's words and tracebacks."""
        return self.root / "pomona.log"

    @property
    def forgotten(self) -> Path:
        """Tombstones of forgotten photos, and receipts."""
        return self.root / "forgotten"

    @property
    def work(self) -> Path:
        """What isn't finished: gone when nothing is under way."""
        return self.root / "_work"

    @property
    def places(self) -> Path:
        """Where OUT was pushed to or pulled from (`pomona.workspace.sync`)."""
        return self.root / ".places.json"

    @property
    def journal(self) -> Path:
        """A change that has been decided and may be half done."""
        return self.work / "journal.json"


def open_out(path: str | Path, *, must_exist: bool = False) -> Out:
    """Return OUT, made if needed.

    Raises
    ------
    RequestError
        If it isn't a local folder, can't be made, or (``must_exist``) isn't there.
    """
    text = str(path)
    refuse_uri(text, "--out")
    root = local_path(text)
    if must_exist and not root.is_dir():
        raise RequestError(f"there is no {text}: pomona extract SOURCE --out {text} makes it")
    out = Out(root)
    foreign = [name for name in OWN_FOLDERS if (root / name).exists()]
    ours = (out.table_file, out.manifest, out.journal, out.places)
    if foreign and not any(path.exists() for path in ours):
        raise RequestError(
            f"--out {text} holds a {foreign[0]} that isn't Pomona's, and it would be replaced: "
            "choose a new folder"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--out {text} can't be made: {error.strerror}") from error
    return out


@contextlib.contextmanager
def lock(out: Out) -> Iterator[None]:
    """Hold OUT for one run. The operating system lets go of it when the process dies.

    A change that a dead run had decided is brought to its end first.

    Raises
    ------
    BusyError
        If another run holds it.
    """
    from filelock import FileLock, Timeout

    try:
        held = FileLock(out.root / ".lock", timeout=1)  # `is_locked` holds it for a moment
        held.acquire()
    except Timeout:
        raise BusyError(
            f"another pomona run is at work on {out.root}: wait for it, or choose another --out"
        ) from None
    except OSError as error:
        raise RequestError(f"--out {out.root} can't be written: {error.strerror}") from error
    try:
        finish_commit(out)
        yield
    finally:
        held.release()


def is_locked(out: Out) -> bool:
    """Tell whether a run holds OUT now."""
    from filelock import FileLock, Timeout

    if not (out.root / ".lock").exists():
        return False
    try:
        with FileLock(out.root / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # somebody else's OUT: no run of ours
        return False


Move = tuple[str | None, str]
"""(from, to), relative to OUT; from None: remove."""


def commit(out: Out, moves: Sequence[Move]) -> None:
    """Apply all moves, or, if killed, let the next run's `lock` apply the rest."""
    write_json(out.journal, [list(move) for move in moves])
    finish_commit(out)


def finish_commit(out: Out) -> None:
    """Apply what the journal holds. Doing a part of it twice does no harm."""
    if not out.journal.exists():
        return
    for source, target in json.loads(out.journal.read_text()):
        to = out.root / target
        if source is not None and not (out.root / source).exists():
            continue  # moved before the kill
        if to.is_dir():
            shutil.rmtree(to)
        else:
            to.unlink(missing_ok=True)
        if source is not None:
            to.parent.mkdir(parents=True, exist_ok=True)
            (out.root / source).rename(to)
    out.journal.unlink()


def update(out: Out, stage: str, record: dict[str, Any]) -> None:
    """Set one stage's record in ``OUT/manifest.json``; the others stay."""
    manifest = read_json(out.manifest)
    manifest.update(format=FORMAT, versions=versions())
    manifest.setdefault("stages", {})[stage] = record
    write_json(out.manifest, manifest)
