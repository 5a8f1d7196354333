"""The folder OUT: its names, its lock, its atomic changes, its manifest."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pomona.core.errors import BusyError, RequestError
from pomona.core.files import (
    FORMAT,
    UNFINISHED,
    make_folder,
    read_json,
    sync_file,
    sync_folder,
    sync_tree,
    write_json,
)
from pomona.core.provenance import versions
from pomona.core.uris import local_path, refuse_uri

log = logging.getLogger("pomona")

OWN_FOLDERS = ("features", "training_pca", "test_pca", "projection", "model", "_work")
"""Folders that a run replaces or removes in OUT: they must not be somebody else's."""


class Out:
    """The paths in OUT."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.features = root / "features"  # the table of features
        self.table_file = self.features / "_table.json"  # the table's settings and list of files
        # The network that made the features, as ONNX, so that training needs no weights.
        self.backbone = self.features / "_backbone.onnx"
        self.projection = root / "projection"  # scaler and PCA
        self.model = root / "model"  # the finished model
        self.tuned = root / "weights.safetensors"  # weights that `pomona finetune` made
        self.tuned_about = root / "weights.json"  # the settings that made them, and their accuracy
        # An unfinished finetune; the hidden name keeps it from being pushed as a result.
        self.tuning = root / ".finetune"
        self.report = root / "report"  # metrics, plots and the page that shows them
        self.metrics = self.report / "metrics.json"  # all metrics of the model
        self.rejected = root / "rejected.csv"  # photos without features
        self.manifest = root / "manifest.json"  # the record of each stage that ran
        self.log = root / "pomona.log"  # Spark's output and tracebacks
        self.forgotten = root / "forgotten"  # tombstones of forgotten photos, and receipts
        self.work = root / "_work"  # intermediate files; absent when no run is unfinished
        # What OUT last had in common with each of its copies (`pomona.workspace.sync_state`).
        self.places = root / ".places.json"
        self.journal = self.work / "journal.json"  # a commit's moves, until all are applied


def open_out(path: str | Path, *, must_exist: bool = False) -> Out:
    """Return OUT, made if needed.

    Raises RequestError if it isn't a local folder, can't be made, or (``must_exist``) isn't there.
    """
    text = str(path)
    refuse_uri(text, "--out")
    root = local_path(text)
    if must_exist and not root.is_dir():
        raise RequestError(f"there is no {text}: pomona extract SOURCE --out {text} makes it")
    out = Out(root)
    foreign = [name for name in OWN_FOLDERS if _holds_something(root / name)]
    ours = (out.table_file, out.manifest, out.journal, out.places)
    if foreign and not any(path.exists() for path in ours):
        raise RequestError(
            f"--out {text} holds a {foreign[0]} that isn't Pomona's, and it would be replaced: "
            "choose a new folder"
        )
    try:
        make_folder(root)
    except OSError as error:
        raise RequestError(f"--out {text} can't be made: {error.strerror}") from error
    return out


def _holds_something(path: Path) -> bool:
    """Tell whether a path holds more than what a first run left that was killed at once."""
    if not path.is_dir() or path.name not in ("features", "_work"):
        return path.exists()
    files = (file for file in path.rglob("*") if not file.is_dir())
    return any(not UNFINISHED.fullmatch(file.name) for file in files)


@contextlib.contextmanager
def lock(out: Out) -> Iterator[None]:
    """Lock OUT for one run. The operating system releases the lock when the process dies.

    A commit that a killed run had begun is finished first. Raises BusyError if another run holds
    the lock, RequestError if OUT can't be written, or part of it lies elsewhere.
    """
    from filelock import FileLock, Timeout

    try:
        file_lock = FileLock(out.root / ".lock", timeout=1)  # `is_locked` may hold it for a moment
        file_lock.acquire()
    except Timeout:
        raise BusyError(
            f"another pomona run is at work on {out.root}: wait for it, or choose another --out"
        ) from None
    except OSError as error:
        raise RequestError(f"--out {out.root} can't be written: {error.strerror}") from error
    try:
        _refuse_elsewhere(out)
        finish_commit(out)
        yield
    finally:
        file_lock.release()


def _refuse_elsewhere(out: Out) -> None:
    """Refuse what a commit can't rename, before anything is decided."""
    disk = out.root.stat().st_dev
    for path in (out.root / name for name in (*OWN_FOLDERS, "report", "forgotten")):
        if path.is_symlink() or (path.exists() and path.stat().st_dev != disk):
            what = "is a link" if path.is_symlink() else "lies on another disk"
            raise RequestError(
                f"{path} {what}, and results are put in place by renaming them: move the folder "
                f"into {out.root}; OUT as a whole may be a link"
            )


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
    except OSError:  # an OUT that we may not write: no run of ours is at work there
        return False


Move = tuple[str | None, str]
"""(from, to), relative to OUT; from None: remove."""


def commit(out: Out, moves: Sequence[Move]) -> None:
    """Apply all moves. After a kill or a power cut meanwhile, the next `lock` applies the rest."""
    for source, _ in moves:
        if source is not None:
            _sync(out, source)
    write_json(out.journal, [list(move) for move in moves])
    finish_commit(out)


def _sync(out: Out, name: str) -> None:
    """Return when a file or folder of OUT is on the disk, and the names that lead to it."""
    path = out.root / name
    sync_tree(path) if path.is_dir() else sync_file(path)
    for folder in path.parents:
        sync_folder(folder)
        if folder == out.root:
            return


def finish_commit(out: Out) -> None:
    """Apply the moves of the journal, if there is one. Each may be applied twice without harm."""
    if not out.journal.exists():
        return
    moves = _read_journal(out)
    for source, target in moves:
        to = out.root / target
        if source is not None and not (out.root / source).exists():
            continue  # moved before the kill
        if to.is_dir():
            shutil.rmtree(to)
        else:
            to.unlink(missing_ok=True)
        if source is not None:
            make_folder(to.parent)
            (out.root / source).rename(to)
    # The new names before the old ones go, and both before the journal: no power cut loses a file.
    targets = {(out.root / target).parent for _, target in moves}
    sources = {(out.root / source).parent for source, _ in moves if source is not None}
    for folder in (*targets, *(sources - targets)):
        if folder.is_dir():
            sync_folder(folder)
    out.journal.unlink()
    sync_folder(out.work)


def _read_journal(out: Out) -> list[Move]:
    """Return the moves; none if the journal is damaged, and then nothing made of others is trusted.

    Of a journal that isn't whole no move has been applied, unless the file was damaged later. Then
    the table may name files that are gone, which `extract` makes good, and what was made from it is
    made anew.
    """
    try:
        return [(source, str(target)) for source, target in json.loads(out.journal.read_bytes())]
    except (ValueError, TypeError):
        log.warning("%s is damaged: what it was for is done again", out.journal)
    manifest = read_json(out.manifest)
    for stage in ("reduce", "train"):
        manifest.get("stages", {}).pop(stage, None)
    if manifest:
        write_json(out.manifest, manifest)
    return []


def update(out: Out, stage: str, record: dict[str, Any]) -> None:
    """Set one stage's record in ``OUT/manifest.json``; other stages keep theirs."""
    manifest = read_json(out.manifest)
    manifest.update(format=FORMAT, versions=versions())
    manifest.setdefault("stages", {})[stage] = record
    write_json(out.manifest, manifest)
