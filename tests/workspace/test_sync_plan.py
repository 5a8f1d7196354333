"""What goes up, what comes down and in which order, decided from dicts."""

from __future__ import annotations

from typing import Any

import pytest

from pomona.core.errors import MismatchError
from pomona.workspace.sync_plan import (
    Files,
    changed_since,
    in_waves,
    is_plain,
    offer,
    plan_parts,
    plan_pull,
    plan_push,
)

TABLE, PART, PLAN = "features/_table.json", "_work/parts-0/1.parquet", "_work/plan.json"


def file(digest: str | None, size: int = 1) -> dict[str, Any]:
    return {"size": size} | ({"sha256": digest} if digest else {})


def sizes(files: Files) -> dict[str, int]:
    return {name: entry["size"] for name, entry in files.items()}


def test_files_that_name_others_follow_them() -> None:
    names = ["manifest.json", TABLE, "model/model.json", "features/x.parquet", "model/model.onnx"]
    assert in_waves(names) == [
        ["features/x.parquet", "model/model.onnx"],
        [TABLE, "model/model.json"],
        ["manifest.json"],
    ]
    assert in_waves(["manifest.json"]) == [["manifest.json"]]
    assert in_waves([]) == []


def test_a_push_sends_what_differs_and_removes_what_it_put() -> None:
    remote = {"same": file("a"), "other": file("b"), "gone": file("c"), "half": file(None)}
    local = {"same": file("a"), "other": file("B"), "half": file("d"), "new": file(None)}
    plan = plan_push(local, remote, sizes(remote))
    assert (plan.names, plan.remove, plan.same) == (["half", "new", "other"], ["gone"], ["same"])


@pytest.mark.parametrize("listed", [{}, {"x": 2}], ids=["missing", "another size"])
def test_a_record_that_the_listing_belies_is_not_believed(listed: dict[str, int]) -> None:
    assert plan_push({"x": file("a")}, {"x": file("a")}, listed).names == ["x"]


def test_parts_follow_what_made_them_and_nothing_is_removed() -> None:
    local = {name: file(None) for name in (PART, TABLE, PLAN, "manifest.json", "rejected.csv")}
    remote = {"gone": file("a")}
    plan = plan_parts(local, remote, sizes(remote), table_empty=True)
    assert (plan.waves, plan.remove) == ([[TABLE], [PLAN], [PART]], [])
    named = plan_parts(local, remote, sizes(remote), table_empty=False)
    assert named.waves == [[PLAN], [PART]], "a table that names files has to follow them"
    del local[PART]
    assert plan_parts(local, remote, sizes(remote), table_empty=False).waves == [], "no new part"


def test_a_pull_removes_what_came_from_there_or_everything() -> None:
    local = {"same": file("a"), "old": file("b"), "came": file("c"), "mine": file("d")}
    offered = {"same": file("a"), "old": file("B"), "new": file("e")}
    common = {"came": file("c"), "long gone": file("f")}
    plan = plan_pull(local, offered, common, everything=False)
    assert (plan.names, plan.remove, plan.same) == (["new", "old"], ["came"], ["same"])
    assert plan_pull(local, offered, common, everything=True).remove == ["came", "mine"]


def test_what_is_going_or_on_its_way_is_not_offered() -> None:
    record = {"x": file("a"), "going": file("b"), "half": file(None), "begun": file(None, 9)}
    listed = {"x": 1, "going": 1, "begun": 3, "not ours": 1}
    assert offer(record, {"going"}, listed, "there") == {"x": file("a"), "begun": file(None, 3)}
    with pytest.raises(MismatchError, match="x is missing at there"):
        offer(record, {"going"}, {}, "there")
    assert offer(None, set(), {"x": 1, "../evil": 1, ".hidden": 1}, "there") == {"x": file(None)}


ASTRAY = (
    "C:/x",
    "c:x",
    "a\\..\\x",
    "\\\\host\\share\\x",
    "//host/share/x",
    "../x",
    "a/../x",
    "/x",
    "",
)


def test_a_name_that_leads_out_of_out_is_not_pulled_on_any_system() -> None:
    """The place's record is a file that others can write; Windows has roots of its own."""
    assert [name for name in ASTRAY if is_plain(name)] == []
    for name in (
        "features/split=Test/part-0.parquet",
        "notes/12:30.txt",
        "training_pca/label=a%3Ab",
    ):
        assert is_plain(name)
    assert offer(None, set(), dict.fromkeys(ASTRAY, 1), "there") == {}


def test_what_changed_here_is_neither_what_is_there_nor_what_was() -> None:
    local = {"new": file(None), "was": file("a"), "there": file("b"), "changed": file("x")}
    common = {"was": file("a"), "there": file("old"), "changed": file("c")}
    remote = {"was": file("newer"), "there": file("b"), "changed": file("c")}
    assert changed_since(local, remote, common) == ["changed", "new"]
