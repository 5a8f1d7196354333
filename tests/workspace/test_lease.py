"""One writer at a time at a place."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from pomona.core.errors import BusyError
from pomona.core.progress import Tick
from pomona.workspace import lease, remote
from pomona.workspace.lease import LOCK, Lease, leased
from pomona.workspace.remote_folder import Place, open_place
from tests.workspace.conftest import lock_of, make_out, there, wait_until


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    return open_place(str(tmp_path / "place"))


def test_a_living_writer_is_left_alone(folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SILENT", 30.0)  # a loaded machine refreshes late
    ticks: list[Tick] = []
    with leased(folder) as holder:
        holder.me = {**holder.me, "host": "elsewhere"}
        with pytest.raises(BusyError, match=r"\(elsewhere, process \d+, since"):
            Lease(folder, ticks.append).acquire()
        assert ticks[-1].done < lease.SILENT
        holder.refresh()
    assert not folder.read_json(LOCK)


@pytest.mark.parametrize(
    ("about", "waits"),
    [({}, True), ({"refreshed": 0}, False), ({"pid": 2**22 + 1, "here": True}, False)],
    ids=["silent", "ancient", "dead on this machine"],
)
def test_a_dead_writer_is_succeeded(folder: Place, about: dict[str, Any], waits: bool) -> None:
    if about.pop("here", False):
        about |= lease._machine()
    lock_of(folder, **about)
    started = time.monotonic()
    ticks: list[Tick] = []
    with leased(folder, ticks.append) as holder:
        assert bool(ticks) == waits
        assert not waits or time.monotonic() - started >= lease.SILENT
        assert folder.read_json(LOCK)["id"] == holder.me["id"]


def test_a_machine_of_the_same_name_is_another(folder: Place) -> None:
    here = {**lease._machine(), "pid": 2**22 + 1, "refreshed": time.time()}
    holder = Lease(folder)
    assert holder._is_dead(here)
    one = "boot" if "boot" in here else "card"
    assert not holder._is_dead({**here, one: "another"})
    del here[one]
    assert not holder._is_dead(here), "as an older Pomona wrote it"


def test_who_lost_the_lock_stops(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(BusyError, match="elsewhere"), remote.opened(bucket, source="x") as home:
        make_out(Path(home.folder))
        lock_of(open_place(bucket))
        home.after("extract")
    assert open_place(bucket).read_json(LOCK)["id"] == "other"
    assert not there(bucket)


def test_who_lost_the_lock_stops_within_the_stage(bucket: str) -> None:
    ticks: list[Tick] = []

    def a_long_stage(home: remote.Home) -> None:
        on_tick = home.ticks(ticks.append)
        on_tick(Tick("extract", 1, 9))
        lock_of(open_place(bucket))
        wait_until(lambda: on_tick(Tick("extract", 2, 9)))

    with pytest.raises(BusyError, match="elsewhere"), remote.opened(bucket, source="x") as home:
        a_long_stage(home)
    assert ticks[0].done == 1
    plain = remote.Home("out", "out").ticks(ticks.append)
    plain(Tick("extract", 3, 9))
    assert ticks[-1].done == 3
