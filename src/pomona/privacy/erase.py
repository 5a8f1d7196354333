"""What `forget` does to each file of OUT: the table whole or not at all, copies one by one.

::

    copies   the log, MLflow's store in OUT, answers: cleaned in place, each file whole
    change   table, parts and lists: new files are staged, then `manifest.commit` puts all in place;
             what was made from the photos goes with the same change

Neither the staged files nor the journal hold a path of a forgotten photo. Everything here may be
done twice.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from pomona.backbone.extract import features_of
from pomona.core.errors import RequestError
from pomona.core.files import atomic_file, read_json, sha256, tree_digest, write_json
from pomona.core.parquet import gather, open_parquet
from pomona.core.schema import FEATURES_TABLE, REJECTED, SPLITS, without
from pomona.pipeline import reduce_tasks
from pomona.privacy.path_patterns import A_PHOTO, Names
from pomona.workspace import feature_table
from pomona.workspace.compaction import next_generation
from pomona.workspace.feature_table import Index
from pomona.workspace.layout import Move, Out

PCA = tuple(reduce_tasks.FOLDERS.values())
DERIVED = ("projection", "model", *(f"{name}{kind}" for name in PCA for kind in ("", "_csv")))
"""What is made from the features, and can hold a photo's numbers."""
REPORT = ("report.html", "metrics.json", "pca_variance.png")
STORE, ARTIFACTS = "mlflow.db", "mlflow-artifacts"
OWN = {
    *DERIVED,
    *("features", "report", "export", "forgotten", "_work", "rejected.csv", "manifest.json"),
    *("weights.safetensors", "weights.json", ".finetune"),
    *("pomona.log", ".lock", ".places.json", STORE, ARTIFACTS),
    *(f"{STORE}-{end}" for end in ("wal", "shm", "journal")),
}
"""The names in OUT that are Pomona's."""


@dataclass
class Found:
    """Where forgotten photos are in OUT.

    Attributes
    ----------
    paths
        The photos.
    index, gone
        All rows of table and parts, and which of them go, bool [rows].
    names
        The photos' names as text.
    pca
        Rows that go, by PCA table.
    stale
        Whether report, model or export may hold a photo that the tables don't hold any more.
    """

    paths: frozenset[str]
    index: Index
    gone: npt.NDArray[np.bool_]
    names: Names
    pca: dict[str, int]
    stale: bool

    @property
    def rows(self) -> dict[str, int]:
        """How many rows go, by table."""
        in_parts = self.index.rows["file"].to_numpy() >= self.index.table_files
        bad = self.index.rows["error"].is_valid().to_numpy() & ~in_parts
        csv = {f"{name}_csv": count for name, count in self.pca.items()}
        found = {
            "features": self.gone & ~in_parts,
            "parts": self.gone & in_parts,
            "rejected.csv": self.gone & bad,
        }
        return {**{name: int(rows.sum()) for name, rows in found.items()}, **self.pca, **csv}

    @property
    def in_derived(self) -> bool:
        """Whether what was made from the tables was, or may have been, made with a photo."""
        return self.stale or bool(self.gone.any()) or any(self.pca.values())


def look(out: Out) -> Index:
    """Return the index of table and parts."""
    spec = read_json(out.table_file).get("spec", {})
    return feature_table.index(out, feature_table.parts_folder(out, spec))


def pca_paths(out: Out) -> dict[str, pa.ChunkedArray]:
    """Return the paths in each PCA table."""
    found = {}
    for name in PCA:
        files = sorted((out.root / name).rglob("*.parquet"))
        parts = [pq.ParquetFile(file).read(["path"])["path"] for file in files]
        chunks = [chunk for part in parts for chunk in part.chunks]
        found[name] = pa.chunked_array(chunks, pa.string())
    return found


def find(out: Out, paths: frozenset[str], index: Index) -> Found:
    """Find the rows and the names of some photos."""
    wanted = pa.array(sorted(paths), pa.string())
    gone = pc.is_in(index.rows["path"], wanted).to_numpy()
    others = index.rows.filter(pa.array(~gone))["filename"]
    files = pa.array(sorted({path.rpartition("/")[2] for path in paths}), pa.string())
    only = files.filter(pc.invert(pc.is_in(files, pc.unique(others))))
    names = Names(paths, [*only.to_pylist(), *_lost_labels(index.rows, gone)])
    pca = {name: pc.sum(pc.is_in(p, wanted)).as_py() or 0 for name, p in pca_paths(out).items()}
    return Found(paths, index, gone, names, pca, _is_stale(out, names))


def _is_stale(out: Out, names: Names) -> bool:
    if any(names.are_in_file(p) for n in REPORT if (p := out.report / n).exists()):
        return True
    reduced = read_json(out.manifest).get("stages", {}).get("reduce", {})
    model = read_json(out.model / "model.json")
    made_from = model.get("made_from", {}).get("digests", {})
    exported = read_json(out.root / "export" / "export.json").get("model", {})
    newest = model.get("digests", {}).get("model.onnx")
    return any(reduced.get("digests", {}).get(name) != made_from[name] for name in made_from) or (
        bool(exported) and exported.get("digest") != newest
    )


def _lost_labels(rows: pa.Table, gone: npt.NDArray[np.bool_]) -> list[str]:
    """Return the folders of labels that lose their last photo, as logs may name them."""
    labels = pc.unique(rows.filter(pa.array(gone))["label"])
    left = pc.unique(rows.filter(pa.array(~gone))["label"])
    lost = labels.filter(pc.invert(pc.is_in(labels, left))).to_pylist()
    return [name for label in lost for name in (f"label={label}", reduce_tasks.partition(label))]


def training_features(out: Out, found: Found) -> npt.NDArray[np.float32]:
    """Return the features [n, 1280] of the Training photos that go."""
    rows = found.index.rows.filter(pa.array(found.gone))
    rows = rows.filter(pc.and_(pc.equal(rows["split"], "Training"), pc.is_null(rows["error"])))
    plan = rows.select(["file", "row"]).combine_chunks().to_batches()
    parts = [
        features_of(table["features"])
        for batch in plan
        for _, table in gather(batch, str(out.root), found.index.files, ["features"])
    ]
    return np.concatenate(parts) if parts else np.zeros((0, 1280), np.float32)


# --- copies ------------------------------------------------------------------------------------


@dataclass
class Copies:
    """What was done to the copies.

    Attributes
    ----------
    log_lines
        That went from the log.
    values
        Of MLflow's database that named a photo.
    rewritten, removed
        Files and folders.
    answers
        Rows of `predict`'s answers in OUT.
    left
        Files in OUT that aren't Pomona's and name a photo.
    """

    log_lines: int = 0
    values: int = 0
    rewritten: int = 0
    removed: int = 0
    answers: int = 0
    left: list[str] = field(default_factory=list)


def clean_copies(out: Out, found: Found, tainted: Callable[[dict[str, Any]], bool]) -> Copies:
    """Clean what isn't part of the change; copies of a model that is ``tainted`` are removed."""
    done = Copies()
    done.log_lines = _clean_log(out.log, found.names)
    _clean_places(out.places, found)
    done.values = _clean_store(out.root / STORE, found.names)
    for folder in sorted((out.root / ARTIFACTS).glob("*/artifacts")):
        _clean_run(folder, found.names, tainted, done)
    for place in sorted(out.root.iterdir()):
        if place.name not in OWN:
            _clean_foreign(out, place, found, done)
    for part in _left_aside(out.root):
        part.unlink(missing_ok=True)
    return done


_ASIDE = re.compile(r"\.[0-9a-f]{32}\.part")


def _left_aside(root: Path) -> Iterator[Path]:
    """Yield the files that a killed run was writing."""
    yield from (path for path in root.rglob(".*.part") if _ASIDE.fullmatch(path.name))


def _clean_log(log: Path, names: Names) -> int:
    """Take the lines out that name any photo, for a name may be cut or escaped in ways of its own.

    The file stays the same one: this process and a JVM may have it open to append to it.
    """
    if not log.exists():
        return 0
    lines = log.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if not A_PHOTO.search(line) and not names.are_in(line)]
    if len(kept) < len(lines):
        with log.open("r+b") as file:
            file.write(b"".join(kept))
            file.truncate()
    return len(lines) - len(kept)


def _clean_places(file: Path, found: Found) -> None:
    """Take out what names a photo, or a label that may be gone: files that a place holds, too.

    Without it the next push looks at those files again.
    """
    known = read_json(file)
    for about in known.get("places", {}).values():
        about["files"] = {
            name: entry
            for name, entry in about.get("files", {}).items()
            if not (found.in_derived and name.partition("/")[0] in DERIVED)
            and not found.names.are_in(name.encode())
        }
    if known:
        write_json(file, known)


def _clean_store(database: Path, names: Names) -> int:
    """Replace names in MLflow's database, and leave no free page that could hold an old value."""
    import sqlite3

    if not database.exists():
        return 0
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=10, isolation_level=None)) as db:
            db.execute("pragma secure_delete = on")
            db.execute("begin immediate")
            count = sum(_clean_table(db, name, names) for name in _tables_of(db))
            db.execute("commit")
            db.execute("vacuum")
            db.execute("pragma wal_checkpoint(truncate)")
            return count
    except sqlite3.Error as error:
        raise RequestError(
            f"{database} can't be cleaned ({error}): stop the MLflow server that uses it, and run "
            "the same command again"
        ) from error


def _tables_of(db: Any) -> list[str]:
    rows = db.execute("select name from sqlite_master where type = 'table' and sql is not null")
    return [name for (name,) in rows if not name.startswith("sqlite_")]


def _clean_table(db: Any, table: str, names: Names) -> int:
    quoted = '"' + table.replace('"', '""') + '"'
    cursor = db.execute(f"select rowid, * from {quoted}")
    columns = ['"' + d[0].replace('"', '""') + '"' for d in cursor.description[1:]]
    changes = [
        (column, names.replaced(value), row[0])
        for row in cursor
        for column, value in zip(columns, row[1:], strict=True)
        if isinstance(value, str) and names.replaced(value) != value
    ]
    for column, value, rowid in changes:
        db.execute(f"update {quoted} set {column} = ? where rowid = ?", (value, rowid))
    return len(changes)


_NUMBERS = (".onnx", ".safetensors", ".png")


def _clean_run(folder: Path, names: Names, tainted: Any, done: Copies) -> None:
    """Clean the files of one run in MLflow's store: reports, lists, and copies of the model."""
    for about in sorted(folder.rglob("model.json")):
        if tainted(read_json(about)):
            shutil.rmtree(about.parent)
            done.removed += 1
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if names.are_in(path.name.encode()):
            path.unlink()
            done.removed += 1
        elif path.suffix not in _NUMBERS and names.are_in_file(path):
            _clean_file(path, names, done)


def _clean_file(path: Path, names: Names, done: Copies) -> None:
    if path.name == "rejected.csv":
        rows = _read_rejected(path)
        named = pc.is_in(rows["path"], pa.array(sorted(names.paths), pa.string()))
        with atomic_file(path) as part:
            pcsv.write_csv(rows.filter(pc.invert(named)), part)
        done.rewritten += 1
        return
    if path.suffix == ".json":
        write_json(path, names.pruned(read_json(path)))
    if path.suffix == ".json" and not names.are_in_file(path):
        done.rewritten += 1
        return
    path.unlink()  # a page: its thumbnails lie in one picture
    done.removed += 1


def _read_rejected(path: Path) -> pa.Table:
    return pcsv.read_csv(
        path,
        parse_options=pcsv.ParseOptions(newlines_in_values=True),
        convert_options=pcsv.ConvertOptions(column_types=REJECTED),
    )


def _clean_foreign(out: Out, place: Path, found: Found, done: Copies) -> None:
    """Clean the answers of `predict`; of other files only tell that they name a photo."""
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    answers = {file.parent for file in files if file.name == "_answers.json"}
    for file in files:
        if file.parent in answers and file.name == "_todo.arrow":
            file.unlink()
        elif file.parent in answers and file.suffix == ".parquet":
            done.answers += _clean_answers(file, found.paths)
        elif found.names.are_in(str(file).encode()) or found.names.are_in_file(file):
            done.left.append(found.names.replaced(file.relative_to(out.root).as_posix()))


def _clean_answers(path: Path, paths: frozenset[str]) -> int:
    rows = pq.ParquetFile(path).read()
    named = [_ends_with(shown, paths) for shown in rows["path"].to_pylist()]
    if any(named):
        with atomic_file(path) as part:
            pq.write_table(rows.filter(pa.array([not n for n in named])), part)
    return sum(named)


def _ends_with(shown: str, paths: frozenset[str]) -> bool:
    """Tell whether a path is one of some, or one of them below some folder."""
    rest = shown
    while rest not in paths:
        _, slash, rest = rest.partition("/")
        if not slash:
            return False
    return True


# --- the change --------------------------------------------------------------------------------


@dataclass
class Change:
    """Files that are staged, and the moves that put them in place.

    Attributes
    ----------
    staged
        A folder in ``OUT/_work``.
    moves
        For `manifest.commit`.
    counts
        ``rewritten`` and ``removed``: files.
    """

    out: Out
    staged: Path
    moves: list[Move] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def remove(self, name: str) -> None:
        """Note that a file or folder of OUT goes."""
        if (self.out.root / name).exists():
            self.moves.append((None, name))
            self.counts["removed"] += 1

    def put(self, name: str) -> Path:
        """Return where a file of OUT is staged."""
        here = self.staged / f"{len(self.moves):06d}"
        self.moves.append((here.relative_to(self.out.root).as_posix(), name))
        self.counts["rewritten"] += 1
        return here


def stage(out: Out, found: Found, change: Change, *, forget_settings: bool) -> None:
    """Stage table, parts, ``rejected.csv`` and manifest without the photos; the derived go.

    With ``forget_settings`` the records of what was derived go too: it isn't to be made again.
    """
    _stage_work(out, found, change)
    if not found.in_derived:
        return
    kept = _stage_table(out, found, change)
    _stage_manifest(out, found, kept, change, forget_settings)
    for name in (*DERIVED, "export", *(f"report/{name}" for name in REPORT)):
        change.remove(name)


def _dropped(found: Found) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Yield each file that holds rows that go, and which rows."""
    numbers = found.index.rows["file"].to_numpy()[found.gone]
    places = found.index.rows["row"].to_numpy()[found.gone]
    for number in np.unique(numbers):
        yield int(number), places[numbers == number]


def _stage_table(out: Out, found: Found, change: Change) -> dict[str, Any]:
    """Stage the table's files that change and ``_table.json``; return what that holds."""
    table = read_json(out.table_file)
    files = dict(table.get("files", {}))
    generation = next_generation(found.index)
    counter: Counter[str] = Counter()
    for number, rows in _dropped(found):
        if number >= found.index.table_files:
            continue
        old = found.index.files[number].removeprefix("features/")
        split = old.partition("/")[0]
        about = files.pop(old)
        change.remove(f"features/{old}")
        if about["rows"] == len(rows):
            continue
        new = f"{split}/part-{generation:05d}-{counter[split]:05d}.parquet"
        counter[split] += 1
        here = change.put(f"features/{new}")
        counts = _without(out.features / old, here, rows, without(FEATURES_TABLE, "split"))
        files[new] = {**counts, "sha256": sha256(here)}
    if table:
        write_json(change.put("features/_table.json"), {**table, "files": files})
    return files


def _without(
    source: Path, target: Path, rows: npt.NDArray[np.int64], schema: pa.Schema
) -> dict[str, int]:
    """Copy a Parquet file without some rows; the others stay as they are, to the bit."""
    count, rejected, first = 0, 0, 0
    file = pq.ParquetFile(source)
    with atomic_file(target) as part, open_parquet(part, schema) as writer:
        for number in range(file.num_row_groups):
            group = file.read_row_group(number).select(schema.names).cast(schema)
            here = np.arange(first, first + group.num_rows)
            first += group.num_rows
            kept = group.filter(pa.array(~np.isin(here, rows)))
            count += kept.num_rows
            rejected += kept.num_rows - kept["error"].null_count
            for batch in kept.to_batches():
                writer.write_batch(batch)
    return {"rows": count, "rejected": rejected}


def _stage_work(out: Out, found: Found, change: Change) -> None:
    """Stage the parts of an extract that isn't finished; the other leavings of killed runs go."""
    _stage_plan(out, found, change)
    if out.tuning.exists():  # it holds pixels of all photos
        change.remove(out.tuning.name)
    kept = set()
    dropped = dict(_dropped(found))
    for number, name in enumerate(found.index.files):
        if number < found.index.table_files:
            continue
        kept.add(out.root / name)
        if number in dropped:
            change.remove(name)
            _stage_part(out, name, dropped[number], change)
    for place in sorted(out.work.glob("*")) if out.work.is_dir() else []:
        if place in (change.staged, out.work / "plan.json"):
            continue
        if not any(path.is_relative_to(place) for path in kept):
            change.remove(place.relative_to(out.root).as_posix())
            continue
        for path in sorted(set(place.iterdir()) - kept):  # a task was writing it
            change.remove(path.relative_to(out.root).as_posix())


def _stage_part(out: Out, name: str, rows: npt.NDArray[np.int64], change: Change) -> None:
    run, task, old_rows, _ = Path(name).stem.split("-")
    if int(old_rows) == len(rows):
        return
    spare = change.staged / f"part-{len(change.moves)}"
    counts = _without(out.root / name, spare, rows, FEATURES_TABLE)
    new = feature_table.PART_FORMAT.format(run=run, task=int(task), **counts)
    spare.rename(change.put(f"{Path(name).parent.as_posix()}/{new}"))


def _stage_plan(out: Out, found: Found, change: Change) -> None:
    """Take the photos off the counts of an extract that isn't finished."""
    plan = read_json(out.work / "plan.json")
    if not plan:
        return
    in_table = found.index.rows["file"].to_numpy() < found.index.table_files
    before = set(found.index.rows.filter(pa.array(in_table & found.gone))["path"].to_pylist())
    parts = set(found.index.rows.filter(pa.array(~in_table & found.gone))["path"].to_pylist())
    todo = _todo(out) & found.paths
    plan["photos"] -= len(before | parts | todo)
    plan["before"] -= len(before - todo)
    write_json(change.put("_work/plan.json"), plan)


def _todo(out: Out) -> set[str]:
    """Return the photos that an extract which isn't finished had to do."""
    try:
        with pa.OSFile(str(out.work / "todo.arrow"), "rb") as file:
            return set(pa.ipc.open_file(file).read_all()["path"].to_pylist())
    except (OSError, pa.ArrowInvalid):
        return set()


def _stage_manifest(
    out: Out, found: Found, files: dict[str, Any], change: Change, forget_settings: bool
) -> None:
    """Stage ``rejected.csv`` and the record of extract, with the counts of what is left."""
    about = read_json(out.manifest)
    record = about.get("stages", {}).get("extract")
    if not record:
        change.remove("rejected.csv")
        return
    if forget_settings:
        for name in ("reduce", "train"):
            about["stages"].pop(name, None)
    in_table = found.index.rows["file"].to_numpy() < found.index.table_files
    rows = found.index.rows.filter(pa.array(in_table & ~found.gone))
    listed = change.put("rejected.csv")
    codes = feature_table.list_rejected(rows, listed)
    splits = {split: pc.sum(pc.equal(rows["split"], split)).as_py() or 0 for split in SPLITS}
    record |= {
        "photos": rows.num_rows,
        "splits": splits,
        "labels": pc.count_distinct(rows["label"]).as_py(),
        "rejected": codes,
        "digests": {
            "features": tree_digest({n: f["sha256"] for n, f in files.items()}),
            "rejected.csv": sha256(listed),
        },
    }
    write_json(change.put("manifest.json"), about)
