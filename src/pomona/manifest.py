"""The folder OUT: its names, its lock, changes that happen whole or not at all, its manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pomona.errors import BusyError, MismatchError, RequestError

FORMAT = 1
"""Of OUT. Raise it when a reader of the old one would be wrong, and keep reading the old ones."""


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
        """Where OUT was pushed to or pulled from (`pomona.mirror`)."""
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


_URI = re.compile(
    r"(?!file:)([a-z][a-z0-9+.-]*://|(dbfs|s3[an]?|gs|gcs|hdfs|abfss?|wasbs?|adl|viewfs):)", re.I
)


def shown(text: str) -> str:
    """Return a URI as it may be printed: without user, password and options; a path as it is.

    A secret may hold slashes that nobody escaped: what follows a colon that is no port's goes up to
    the last ``@``.

    >>> shown("s3a://KEY:SEC/RET@bucket/out?region=x"), shown("hdfs://host:8020/a@b"), shown("a@b?")
    ('s3a://bucket/out', 'hdfs://host:8020/a@b', 'a@b?')
    """
    if not _URI.match(text):
        return text
    user = r"(?:[^/@:]*:(?!\d*(?:/|$)).*|[^/@]*)@"
    return re.sub(rf"^([^:/]+:/*){user}", r"\1", text.partition("?")[0])


def is_store(text: str) -> bool:
    """Whether a name is an object store's URI."""
    return re.match("(s3|gs|gcs)://", text, re.I) is not None


def now() -> str:
    """Return the time, in UTC, as records hold it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def refuse_uri(text: str, what: str) -> None:
    """Refuse a URI where a folder is needed.

    Raises
    ------
    RequestError
        With what to do instead.
    """
    if not _URI.match(text):
        return
    if is_store(text):
        raise RequestError(
            f"{what} is a folder here, not {shown(text)}: run, extract, reduce, train, report, "
            "export, publish, forget and status take object stores; elsewhere pomona pull and "
            "pomona push copy OUT"
        )
    raise RequestError(
        f"{what} is a folder, s3://… or gs://…, not {shown(text)}: write s3:// for s3a://, or take "
        "a folder of the driver and copy it afterwards (docs/storage.md)"
    )


def local_path(text: str) -> Path:
    """Return the absolute path of a path or a ``file:`` URI."""
    if text.startswith("file:"):
        text = unquote(re.sub("^file:(//[^/]*)?", "", text))
        text = text[1:] if re.match(r"/[A-Za-z]:/", text) else text  # file:///C:/photos
    return Path(text).expanduser().resolve()


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


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Give a file to write; it becomes ``path`` when it is whole. Runs on workers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_aside(dest: Path, option: str) -> Iterator[Path]:
    """Give a folder to make and fill; it takes the place of ``dest`` when it is whole.

    Raises
    ------
    RequestError
        If it can't be written; names the command's ``option``.
    """
    staged = dest.with_name(f".{dest.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield staged
        if dest.exists():
            shutil.rmtree(dest)
        staged.rename(dest)
    except OSError as error:
        raise RequestError(f"{option} {dest} can't be written: {error.strerror}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """Write sorted JSON; a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole."""
    with aside(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read JSON that Pomona wrote; an empty dict where there is none.

    Raises
    ------
    MismatchError
        If it isn't JSON, or of a newer format.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise MismatchError(f"{path} is damaged: remove it, or choose another --out") from error
    if value.get("format", FORMAT) > FORMAT:
        raise MismatchError(f"{path} has format {value['format']}, made by a newer Pomona: update")
    return dict(value)


def sha256(path: Path) -> str:
    """Return a file's sha256."""
    with path.open("rb") as file:
        sha = hashlib.sha256()
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def tree_digest(files: dict[str, str]) -> str:
    """Return one digest for many files, given each one's by name."""
    lines = "".join(f"{name}\0{files[name]}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions that may change a result."""
    found = {"python": platform.python_version()}
    for name in (
        "pomona",
        "pyspark",
        "pyarrow",
        "numpy",
        "pillow",
        "onnxruntime",
        "scikit-learn",
        "torch",
    ):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def update(out: Out, stage: str, record: dict[str, Any]) -> None:
    """Set one stage's record in ``OUT/manifest.json``; the others stay."""
    manifest = read_json(out.manifest)
    manifest.update(format=FORMAT, versions=versions())
    manifest.setdefault("stages", {})[stage] = record
    write_json(out.manifest, manifest)
