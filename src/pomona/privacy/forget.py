"""The stage ``forget``: erase photos from OUT, and never take them in again.

::

    begin    tombstones and ``pending.json`` (phase ``erase``): it is decided
    erase    copies are cleaned, then table and lists change in one commit; the derived go
    rebuild  reduce, train and report again, with the settings in the manifest (phase ``rebuild``)
    receipt  what was done, without a path

A forget that was killed is ended by `finish`: the rows that must go are those with a tombstone. A
photo that is in no table it can't name, so it can't clean the log and other copies of that name:
``pending.json`` then stays (phase ``names``) until the same command comes again; nothing waits.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pomona.core.errors import (
    BusyError,
    JobError,
    MissingError,
    PomonaError,
    RequestError,
    SourceError,
    first_line,
)
from pomona.core.files import FORMAT, read_json, write_json
from pomona.core.progress import OnTick, Tick, quiet
from pomona.core.provenance import utc_now
from pomona.core.uris import local_path
from pomona.photos.reading import reader
from pomona.photos.source import open_readable
from pomona.pipeline import run
from pomona.pipeline.reduce import ReduceOptions, reduce
from pomona.pipeline.train import TrainOptions, train
from pomona.privacy import erase
from pomona.privacy.erase import Change, Found
from pomona.registry import lineage
from pomona.spark.session import Cluster
from pomona.workspace import feature_table, layout, tombstones
from pomona.workspace.layout import Out
from pomona.workspace.tombstones import Tombstones

ERASE, REBUILD, NAMES = "erase", "rebuild", "names"
STDIN = "-"


@dataclass(frozen=True)
class ForgetOptions:
    """How photos are forgotten; see ``pomona forget --help``.

    Attributes
    ----------
    listed
        Exact paths, beside the photos and patterns that are named.
    rebuild
        Make again what was made from the photos.
    retire
        Delete the versions in ``OUT/mlflow.db`` that were trained with the photos.
    missing_ok
        Take exact paths that neither the tables nor the source hold.
    """

    listed: tuple[str, ...] = ()
    rebuild: bool = True
    retire: bool = False
    missing_ok: bool = False
    dry_run: bool = False


def forget(
    out: str | Path,
    photos: Sequence[str] = (),
    options: ForgetOptions | None = None,
    cluster: Cluster | None = None,
    on_tick: OnTick = quiet,
    after: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Erase photos from OUT and put a tombstone in each one's place. Returns the receipt.

    Parameters
    ----------
    photos
        Paths as in the table, or patterns (`matcher`). With none at all, a forget that isn't
        finished is ended.
    after
        Called when the tombstones are written and when the photos are erased, before anything is
        made again; nothing holds OUT then.

    Returns
    -------
    dict
        As in ``OUT/forgotten/receipt-….json``, and ``file``, its name. With ``dry_run`` the plan.

    Raises
    ------
    RequestError
        And its kinds: a pattern matches nothing, a path is nowhere, another run is at work. Nothing
        has changed then, but for a forget that was killed, which goes on first.
    """
    options = options or ForgetOptions()
    folder = layout.open_out(out, must_exist=True)
    if not folder.table_file.exists():
        raise RequestError(f"{out} holds nothing of Pomona's: there is nothing to forget")
    named = [*photos, *options.listed]
    with layout.lock(folder):
        before = tombstones.pending(folder)
        under_way = before.get("phase") in (ERASE, REBUILD)
        if before.get("phase") == ERASE and not options.dry_run:
            # Of this very command: what is in no table is known by its name alone.
            stones = tombstones.read(folder)
            same = frozenset(path for path in named if stones.id_of(path) in stones.ids)
            _erase(folder, same, before, on_tick)
        paths: frozenset[str] = frozenset()
        if named:
            paths = _wanted(folder, photos, options, ended=under_way)
        elif not before:
            raise RequestError("forget takes photos: paths as in the table, patterns, or --list")
        begun = None
        if paths and not (under_way and _is_done(folder, paths)):
            if options.dry_run:
                return _plan(folder, paths)
            begun = _begin(folder, paths, options)
        elif options.dry_run:
            return {"photos": 0, "pending": before}
    after("forget")
    if begun:
        with layout.lock(folder):
            _refuse_other(folder, begun)
            _erase(folder, paths, begun, on_tick)
        after("forget")
    receipt = _rebuild(folder, cluster, on_tick)
    if not named and (left := len(tombstones.pending(folder).get("unnamed", []))):
        raise RequestError(
            f"{left} photos of a forget that was stopped are in no table, and {folder.root} may "
            "still name them: run that same pomona forget again, with its paths"
        )
    return receipt


def _refuse_other(out: Out, begun: dict[str, Any]) -> None:
    """Refuse to erase if another command went on with it when nothing held OUT."""
    now = tombstones.pending(out)
    if (now.get("receipt"), now.get("phase")) != (begun["receipt"], ERASE):
        raise BusyError(f"another pomona command is at work on {out.root}: run the same again")


def finish(
    out: str | Path,
    cluster: Cluster | None = None,
    on_tick: OnTick = quiet,
    *,
    rebuild: bool = True,
) -> dict[str, Any] | None:
    """End a forget that was killed, if there is one. Without ``rebuild`` only rows are erased."""
    folder = Out(local_path(str(out)))
    if not is_pending(folder):
        return None
    with layout.lock(folder):
        before = tombstones.pending(folder)
        if before.get("phase") not in (ERASE, REBUILD):  # the journal was another's
            return None
        if before.get("phase") == ERASE:
            _erase(folder, frozenset(), before, on_tick)
    return _rebuild(folder, cluster, on_tick) if rebuild else None


def is_pending(out: Out) -> bool:
    """Tell whether a forget may have been killed: the journal may hold its beginning."""
    return tombstones.pending_file(out).exists() or out.journal.exists()


def allow(out: str | Path, photos: Sequence[str]) -> dict[str, Any]:
    """Take tombstones away, so that the next ``extract`` takes these photos in again.

    Raises
    ------
    RequestError
        If one of them has none. Nothing has changed then.
    """
    folder = layout.open_out(out, must_exist=True)
    with layout.lock(folder):
        found = tombstones.read(folder)
        strange = [path for path in photos if found.id_of(path) not in found.ids]
        if strange or not photos:
            raise RequestError(
                f"{_first(strange)} is not forgotten in {folder.root}: --allow takes exact paths"
                if photos
                else "--allow takes the exact paths of forgotten photos"
            )
        tombstones.write(tombstones.place(folder), found.lacking(photos))
    return {"allowed": len(photos), "tombstones": tombstones.total(folder)}


def _is_done(out: Out, paths: frozenset[str]) -> bool:
    """Tell whether all are erased, rows and names: the same command, after a kill."""
    stones = tombstones.read(out)
    unnamed = tombstones.pending(out).get("unnamed", [])
    if any(stones.id_of(path).hex() in unnamed for path in paths):
        return False
    rows = pc.is_in(_known(out), pa.array(sorted(paths), pa.string()))
    return all(stones.id_of(p) in stones.ids for p in paths) and not pc.any(rows).as_py()


def _first(names: Sequence[str]) -> str:
    more = f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""
    return f"{names[0]}{more}" if names else ""


# --- which photos ------------------------------------------------------------------------------


def read_list(file: str) -> tuple[str, ...]:
    """Return the lines of a file, or of standard input (``-``).

    Raises
    ------
    RequestError
        If it can't be read, isn't UTF-8, or holds none.
    """
    try:
        content = sys.stdin.buffer.read() if file == STDIN else Path(file).read_bytes()
        lines = [line for line in re.split(r"\r?\n", content.decode()) if line]
    except OSError as error:
        raise RequestError(f"--list {file} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"--list {file} is not UTF-8") from error
    if not lines:
        raise RequestError(f"--list {file} holds no paths: one on each line")
    return tuple(lines)


def matcher(pattern: str) -> str:
    r"""Return a pattern as a regular expression over whole paths, upper and lower case distinct.

    ``*`` and ``?`` stay within a folder, ``**`` crosses folders, ``[…]`` is one of some characters.

    >>> matcher("Training/*/a?.jpg")
    'Training/[^/]*/a[^/]\\.jpg'
    >>> matcher("**/x[0-9].png")
    '(?:.*/)?x[0-9]\\.png'
    """
    found = ""
    for part in re.findall(r"\*\*/|\*\*|\*|\?|\[[!^]?\]?[^\]]+\]|.", pattern, re.S):
        if part in _WILD:
            found += _WILD[part]
        elif part.startswith("[") and len(part) > 1:
            inside = re.sub(r"([\\[&~|])", r"\\\1", part[1:-1]).replace("--", r"-\-")
            found += "[" + re.sub("^!", "^", inside) + "]"
        else:
            found += re.escape(part)
    return found


def _matching(pattern: str, known: pa.Array) -> list[str]:
    try:
        found = re.compile(matcher(pattern), re.DOTALL)
    except re.error as error:
        raise RequestError(f"{pattern} is not a pattern: {error}") from error
    return [path for path in known.to_pylist() if found.fullmatch(path)]


_WILD = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def _wanted(
    out: Out, photos: Sequence[str], options: ForgetOptions, *, ended: bool
) -> frozenset[str]:
    """Return the paths that are meant; ``ended``: a pattern's photos may have gone just now."""
    known = pc.unique(_known(out))
    start = f"{read_json(out.table_file)['source'].rstrip('/')}/"
    patterns = {path.removeprefix(start) for path in photos}
    exact = patterns | {path.removeprefix(start) for path in options.listed}
    here = set(known.filter(pc.is_in(known, pa.array(sorted(exact), pa.string()))).to_pylist())
    found = set(here)
    stones = tombstones.read(out)
    absent = []
    for path in sorted(exact - here):
        if stones.id_of(path) in stones.ids or options.missing_ok:
            found.add(path)
        elif path in patterns and re.search(r"[*?\[]", path):
            matches = _matching(path, known)
            if not matches and not ended:
                raise RequestError(
                    f"{path} matches no photo in {out.root}: * stays within a folder, ** crosses "
                    "folders, case counts"
                )
            found.update(matches)
        else:
            absent.append(path)
    inside = _in_source(out, absent)
    if missing := [path for path in absent if path not in inside]:
        raise RequestError(
            f"{_first(missing)} is neither in the tables of {out.root} nor in its source: give "
            "paths as in the column path, or --missing-ok to take them anyway"
        )
    return frozenset(found | inside)


def _known(out: Out) -> pa.ChunkedArray:
    """Return all paths in features, parts and PCA tables."""
    columns = [erase.look(out).rows["path"], *erase.pca_paths(out).values()]
    return pa.chunked_array([c for column in columns for c in column.chunks], pa.string())


def _in_source(out: Out, paths: Iterable[str]) -> set[str]:
    """Return the paths that lie in the source; none where it is out of reach."""
    found: set[str] = set()
    try:
        read = reader(open_readable(read_json(out.table_file)["source"]))
    except SourceError:
        return found
    for path in paths:
        try:
            if ".." not in Path(path).parts and not Path(path).is_absolute():
                read(path)
                found.add(path)
        except (OSError, SourceError):
            continue
    return found


# --- begin and erase ---------------------------------------------------------------------------


def _plan(out: Out, paths: frozenset[str]) -> dict[str, Any]:
    """Return what would go, for a person to decide on; it is written nowhere."""
    found = erase.find(out, paths, erase.look(out))
    derived = [name for name in (*erase.DERIVED, "export") if (out.root / name).exists()]
    report = [f"report/{n}" for n in erase.REPORT if (out.report / n).exists()]
    versions, silent = lineage.versions(out, _lineage(out, found))
    return {
        "photos": len(paths),
        "paths": sorted(paths),
        "rows": found.rows,
        "derived": [*derived, *report] if found.in_derived else [],
        "models": versions,
        "out_of_reach": silent,
    }


def _lineage(out: Out, found: Found) -> lineage.Lineage:
    rows = found.index.rows.filter(pa.array(found.gone))["path"].to_pylist()
    unseen = any(not path.startswith("Test/") for path in found.paths - set(rows))
    return lineage.of(
        out,
        in_pca=bool(found.pca["training_pca"]),
        unseen=unseen and not found.pca["training_pca"],
        vectors=erase.training_features(out, found),
    )


def _begin(out: Out, paths: frozenset[str], options: ForgetOptions) -> dict[str, Any]:
    """Write tombstones and `tombstones.pending_file`: from here on it is decided."""
    old = tombstones.pending(out)
    stones = tombstones.read(out)
    new = stones.having(paths)
    now = datetime.now(timezone.utc)
    name = f"receipt-{now:%Y%m%dT%H%M%SZ}-{feature_table.new_run()}.json"
    pending = {
        "format": FORMAT,
        "phase": ERASE,
        "rebuild": options.rebuild,
        "retire": options.retire,
        "ids": sorted(stones.id_of(path).hex() for path in paths),
        "added": len(new.ids) - len(stones.ids),
        "receipt": name,
        "receipts": [*old.get("receipts", []), name],
        "unnamed": old.get("unnamed", []),
        "todo": old.get("todo", []),
        "plots": old.get("plots", False) or (out.report / "pca_variance.png").exists(),
    }
    # Both or none: a tombstone alone would let extract drop the row, and leave the copies.
    staged = out.work / f"begin-{feature_table.new_run()}"
    tombstones.write(staged / "tombstones.json", new)
    write_json(staged / "pending.json", pending)
    here = staged.relative_to(out.root).as_posix()
    names = ("tombstones.json", "pending.json")
    layout.commit(out, [(f"{here}/{name}", f"forgotten/{name}") for name in names])
    return pending


def _erase(out: Out, paths: frozenset[str], pending: dict[str, Any], on_tick: OnTick) -> None:
    """Erase ``paths`` and all photos in the tables that have a tombstone."""
    on_tick(Tick("forget", 0, 3))
    index = erase.look(out)
    stones = tombstones.read(out)
    known = pc.unique(_known(out))
    found = erase.find(out, paths | frozenset(known.filter(stones.held(known)).to_pylist()), index)
    before = _digests(out)
    wanted = _lineage(out, found)
    versions, silent = lineage.versions(out, wanted)
    if pending["retire"]:
        lineage.retire(out, versions)
    on_tick(Tick("forget", 1, 3))
    copies = erase.clean_copies(out, found, lambda about: wanted.saw(about) is not None)
    on_tick(Tick("forget", 2, 3))
    change = Change(out, out.work / f"forget-{feature_table.new_run()}")
    rebuild = pending["rebuild"]
    todo = _todo(out) if found.in_derived and rebuild else []
    exported = found.in_derived and (out.root / "export").exists()
    erase.stage(out, found, change, forget_settings=not rebuild)
    receipt = _receipt(stones, pending, found, change, copies)
    receipt |= {
        "models": versions,
        "out_of_reach": silent,
        "export_removed": exported,
        "digests": {"before": before},
    }
    todo = [name for name in ("reduce", "train", "report") if name in {*todo, *pending["todo"]}]
    unnamed = {*pending["ids"], *pending.get("unnamed", [])}
    unnamed -= {stones.id_of(path).hex() for path in found.paths}
    after = {**pending, "phase": REBUILD, "todo": todo, "unnamed": sorted(unnamed)}
    write_json(change.put(f"forgotten/{pending['receipt']}"), receipt)
    write_json(change.put("forgotten/pending.json"), after)
    layout.commit(out, change.moves)
    on_tick(Tick("forget", 3, 3))


def _receipt(
    stones: Tombstones,
    pending: dict[str, Any],
    found: Found,
    change: Change,
    copies: erase.Copies,
) -> dict[str, Any]:
    from pomona import __version__

    return {
        "format": FORMAT,
        "pomona": __version__,
        "finished": None,
        "erased": utc_now(),
        "photos": len(pending["ids"]),
        "tombstones": pending["ids"],
        "tombstones_added": pending["added"],
        "rows": found.rows,
        "files": dict(change.counts),
        "copies": asdict(copies),
        "made_again": {},
    }


def _digests(out: Out) -> dict[str, str]:
    """Return what the tables and the model are."""
    stages_ = read_json(out.manifest).get("stages", {})
    found = {"features": feature_table.digest(out)}
    for stage in ("reduce", "train"):
        found |= stages_.get(stage, {}).get("digests", {})
    return found


def _todo(out: Out) -> list[str]:
    """Return what had been made from the photos."""
    made = read_json(out.manifest).get("stages", {})
    found = [stage for stage in ("reduce", "train") if stage in made]
    return [*found, *(["report"] if (out.report / "report.html").exists() else [])]


# --- rebuild -----------------------------------------------------------------------------------


def _rebuild(out: Out, cluster: Cluster | None, on_tick: OnTick) -> dict[str, Any]:
    """Make again what had been made, and complete the receipts. Returns the last one.

    A receipt isn't complete while a photo of it hasn't been named.
    """
    pending = tombstones.pending(out)
    made: dict[str, str] = {}
    waits = (out.work / "plan.json").exists()
    for stage in pending["todo"]:
        if waits:
            made[stage] = "no: extract isn't finished"
        else:
            made[stage] = _again(out, stage, pending["plots"], cluster, on_tick)
    with layout.lock(out):
        stones = {one.hex() for one in tombstones.read(out).ids}
        unnamed = stones.intersection(pending.get("unnamed", []))
        waiting = []
        for name in pending["receipts"]:
            file = out.forgotten / name
            receipt = read_json(file)
            if not receipt:  # somebody removed it
                continue
            receipt["made_again"] |= made
            receipt["digests"]["after"] = _digests(out)
            if unnamed.intersection(receipt["tombstones"]):
                waiting.append(name)
            else:
                receipt["finished"] = utc_now()
            write_json(file, receipt)
        if unnamed:
            kept = {"phase": NAMES, "todo": [], "unnamed": sorted(unnamed), "receipts": waiting}
            write_json(tombstones.pending_file(out), {**pending, **kept})
        else:
            tombstones.pending_file(out).unlink()
        for place in (*out.work.glob("begin-*"), *out.work.glob("forget-*")):
            shutil.rmtree(place)  # of one that was killed
        if out.work.is_dir() and not any(out.work.iterdir()):
            out.work.rmdir()
    receipt = read_json(out.forgotten / pending["receipt"])
    return {**receipt, "file": f"forgotten/{pending['receipt']}"}


def _again(out: Out, stage: str, plots: bool, cluster: Cluster | None, on_tick: OnTick) -> str:
    """Make one stage's outputs again. Returns ``yes``, or why it can't be; then its record goes."""
    made = read_json(out.manifest).get("stages", {})
    if ("reduce" if stage == "report" else stage) not in made:
        return "no: what it is made from is not there"
    try:
        if stage == "reduce":
            settings = made["reduce"]["made_from"]["settings"]
            options = ReduceOptions(**settings, plots=plots)
            reduce(out.root, options, cluster, on_tick)
        elif stage == "train":
            settings = made["train"]["made_from"]["settings"]
            train(out.root, TrainOptions(**settings), on_tick)
        elif not (out.report / "report.html").exists():
            run.report(out.root, on_tick)
    except (BusyError, MissingError, JobError) as error:
        raise type(error)(
            f"the photos are erased, but {stage} isn't made again yet ({error}): pomona forget "
            "--out … alone goes on"
        ) from error
    except PomonaError as error:
        _drop(out, stage)
        return f"no: {first_line(error)}"
    return "yes"


def _drop(out: Out, stage: str) -> None:
    """Take a stage's record out of the manifest: its outputs are gone, and stay so."""
    with layout.lock(out):
        about = read_json(out.manifest)
        about.get("stages", {}).pop(stage, None)
        write_json(out.manifest, about)
