"""What a push or a pull copies and removes, and in which order: pure functions of dicts.

At any moment of a push, a reader can trust what is there, and a killed push can be repeated: a file
that names others follows them, the manifest comes last, and removals come after all copies.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PureWindowsPath
from typing import NamedTuple

from pomona.core.errors import MismatchError
from pomona.workspace.remote_folder import Entry

Files = dict[str, Entry]
"""By name: ``size`` in bytes, ``sha256`` where it is known, ``modified`` (ns) of local files."""

PARTS = "_work/parts-"
EXTRACT_PLAN = "_work/plan.json"
TABLE = ("features/_table.json", "features/_backbone.onnx")

INDEX_FILES = ("_table.json", "projection.json", "model.json")
"""Files that name other files."""


class Plan(NamedTuple):
    """What to copy and what to remove, by name."""

    waves: list[list[str]]  # to copy; a wave starts when the one before it is whole
    remove: list[str]  # once everything is copied
    same: list[str]  # what both sides hold alike

    @property
    def names(self) -> list[str]:
        """All names to copy, in order."""
        return [name for wave in self.waves for name in wave]


def plan_push(local: Files, remote: Files, sizes: dict[str, int]) -> Plan:
    """Plan how to make the place like OUT, whose files are ``local``.

    ``remote`` is what was put there, by the place's record; ``sizes`` the size in bytes of each
    file that is there now, by its listing.
    """
    whole = {name: entry for name, entry in remote.items() if entry["size"] == sizes.get(name)}
    same = [name for name, entry in local.items() if _agree(entry, whole.get(name))]
    gone = sorted(remote.keys() - local.keys())
    return Plan(in_waves(local.keys() - set(same)), gone, same)


def plan_parts(local: Files, remote: Files, sizes: dict[str, int], *, table_empty: bool) -> Plan:
    """Plan a push of the new parts while ``extract`` is at work. Nothing is removed.

    Parts are useless without the files that say how they were made, so these go first, as long as
    the table names no files (``table_empty``). A table that does must follow them: `plan_push`.
    """
    push = plan_push(local, remote, sizes)
    waves = in_waves(name for name in push.names if table_empty and name in TABLE)
    parts = [name for name in push.names if name.startswith(PARTS)]
    if parts:  # after the plan, without which nobody could tell how far the run is
        waves += [[EXTRACT_PLAN], parts] if EXTRACT_PLAN in push.names else [parts]
    return Plan(waves, [], push.same)


def plan_pull(local: Files, offered: Files, common: Files, *, everything: bool) -> Plan:
    """Plan how to make OUT, whose files are ``local``, like the place.

    ``offered`` is what `offer` returns, ``common`` what OUT and the place last had in common. With
    ``everything`` all that the place doesn't have is removed, and not only what came from there.
    """
    same = [name for name, entry in local.items() if _agree(entry, offered.get(name))]
    candidates = local.keys() if everything else local.keys() & common.keys()
    gone = sorted(candidates - offered.keys())
    return Plan(in_waves(offered.keys() - set(same)), gone, same)


def offer(remote: Files | None, going: set[str], sizes: dict[str, int], place: object) -> Files:
    """Return what there is to pull: by the record, or by the listing where there is no record.

    Raises MismatchError if a file of the record isn't there.
    """
    if remote is None:
        return {name: {"size": size} for name, size in sizes.items() if is_plain(name)}
    offered = {name: entry for name, entry in remote.items() if name not in going}
    for name in sorted(offered.keys() - sizes.keys()):
        if "sha256" in offered.pop(name):  # without it, its upload had not ended
            raise MismatchError(
                f"{name} is missing at {place}: if no run is at work there, push again from the "
                "OUT that it came from"
            )
    return {name: {**entry, "size": sizes[name]} for name, entry in offered.items()}


def changed_since(local: Files, remote: Files, common: Files) -> list[str]:
    """Return the files of OUT that are neither as the place has them nor as it had them."""
    return sorted(
        name
        for name, entry in local.items()
        if not any(_agree(entry, files.get(name)) for files in (common, remote))
    )


def in_waves(names: Iterable[str]) -> list[list[str]]:
    """Sort names into waves: plain files, then those that name others, then the manifest."""
    waves: list[list[str]] = [[], [], []]
    for name in sorted(names):
        names_others = name.rsplit("/", 1)[-1] in INDEX_FILES
        waves[2 if name == "manifest.json" else int(names_others)].append(name)
    return [wave for wave in waves if wave]


def is_plain(name: str) -> bool:
    r"""Whether a name leads into OUT and nowhere else: a record is a file that others can write.

    On Windows, too, where ``C:/x`` is absolute and ``\`` separates folders.
    """
    if "\\" in name or PureWindowsPath(name).drive:
        return False
    return not any(part.startswith(".") or not part for part in name.split("/"))


def _agree(entry: Entry, other: Entry | None) -> bool:
    """Whether both digests are known, and the same."""
    digest = entry.get("sha256")
    return other is not None and digest is not None and digest == other.get("sha256")
