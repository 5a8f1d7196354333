"""A forget that was killed is ended, and so is one of an OUT whose extract was killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pomona.core import parquet, schema
from pomona.core.errors import RequestError
from pomona.core.files import read_json, write_json
from pomona.pipeline.extract import extract
from pomona.pipeline.status import status
from pomona.privacy import copies, forget
from pomona.privacy.forget import ForgetOptions
from pomona.workspace import feature_table, layout, tombstones
from tests.privacy.conftest import QUICK, QUIET, SECRET, others, write_answers
from tests.privacy.leftovers import everything, feature_rows, hits, needles, tree

POINTS = ["move:1", "move:2", "copies:1", "stage:1", "move:4", "move:8", "remove:4", "rebuild:1"]


def test_killed_anywhere(out: Path, tmp_path: Path) -> None:
    """The same command ends it, or the next one does; no journal and no staged file has a name."""
    reference = Path(shutil.copytree(out, tmp_path / "reference"))
    wanted = needles(out, SECRET)
    forget.forget(reference, SECRET, QUIET)
    expected = without_receipts(reference)
    places = {point: Path(shutil.copytree(out, tmp_path / point)) for point in POINTS}
    kill(places)
    for number, (point, place) in enumerate(places.items()):
        for name, content in everything(place):
            if name.startswith(("_work/", "forgotten/")):
                assert not [w for w, needle in wanted.items() if needle in content], (point, name)
        receipt = forget.finish(place) if number % 2 else None
        assert bool(receipt) == bool(number % 2)
        receipt = receipt or forget.forget(place, SECRET, QUIET)
        assert receipt["finished"], point
        assert receipt["photos"] == len(SECRET)
        assert hits(place, wanted) == {}, point
        assert without_receipts(place) == expected, point
        assert not tombstones.pending(layout.open_out(place))
        assert not (place / "_work").exists()


def kill(places: Mapping[str, Path]) -> None:
    """Forget the photos in each OUT, killed at its point (`tests/privacy/kill.py`)."""
    script = Path(__file__).with_name("kill.py")
    killed = json.dumps([[point, str(out)] for point, out in places.items()])
    process = subprocess.run(
        [sys.executable, str(script), killed, *SECRET],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    codes = json.loads(process.stdout)
    assert codes == [9] * len(places), (list(places), codes, process.stderr)


def without_receipts(out: Path) -> dict[str, str]:
    return {name: sha for name, sha in tree(out).items() if not name.startswith("forgotten/")}


def test_a_run_ends_it_first(out: Path, finished: Path, command: Any) -> None:
    kill({"copies:1": out})
    with pytest.raises(RequestError, match="pomona forget isn't finished"):
        extract(finished / "source", out, QUICK)
    code, _, stderr = command("report", "--out", out)
    # Its rows are gone, and so is what was made from them.
    assert code in (1, 2), stderr
    assert len(feature_rows(out)) == 49
    assert tombstones.pending(layout.open_out(out))["phase"] == "rebuild"
    assert (forget.finish(out) or {})["made_again"] == {}
    assert forget.finish(out) is None


def test_killed_when_only_the_command_knew_a_name(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in no table can't be told from its tombstone: the rest goes on, and it is asked."""
    folder, left = layout.open_out(out), "Training/left7737.jpg"
    answers = write_answers(out, [left, "Training/Fruit 0/kind 0/0.jpg"])
    named, options = [left, SECRET[0]], ForgetOptions(rebuild=False, missing_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(copies, "clean", interrupted)
        with pytest.raises(KeyboardInterrupt):
            forget.forget(out, named, options)
    receipt = forget.finish(out)
    assert receipt
    assert receipt["finished"] is None
    assert SECRET[0] not in {row["path"] for row in feature_rows(out)}
    assert pq.read_table(answers)["path"].to_pylist()[0] == left
    assert (status(out)["forgetting"], status(out)["unnamed"]) == (True, 1)
    tombstones.refuse_erasing(folder)  # runs go on
    assert forget.finish(out) is None
    with pytest.raises(RequestError, match=r"1 photos of a forget .* again, with its paths"):
        forget.forget(out)
    with pytest.raises(RequestError, match="matches no photo"):
        forget.forget(out, ["*.nothing"], QUIET)
    other = forget.forget(out, [SECRET[2]], options)
    assert other["finished"]
    assert status(out)["unnamed"] == 1
    again = forget.forget(out, named, options)
    assert again["copies"]["answers"] == 1
    assert pq.read_table(answers).num_rows == 1
    receipts = [json.loads(p.read_text()) for p in (out / "forgotten").glob("receipt-*")]
    assert len(receipts) == 3
    assert all(receipt["finished"] for receipt in receipts)
    assert (status(out)["forgetting"], status(out)["unnamed"]) == (False, 0)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_parts_and_the_list_of_what_is_to_do(out: Path) -> None:
    """As a killed extract leaves them: three photos to do again, of which two are done."""
    folder = layout.open_out(out)
    spec = read_json(folder.table_file)["spec"]
    parts = feature_table.parts_folder(folder, spec)
    parts.mkdir(parents=True)
    wanted, before = needles(out, SECRET), others(out)
    index = feature_table.index(folder, parts).rows
    mine = index.filter(pa.compute.is_in(index["path"], pa.array(SECRET[:2])))
    done = index.filter(pa.compute.equal(index["path"], "Test/Fruit 0/kind 0/0.jpg"))
    fields = schema.FEATURES_TABLE
    full = [row for row in feature_rows(out) if row["path"] in (SECRET[0], done["path"][0].as_py())]
    values = [{name: row[name] for name in fields.names} for row in full]
    batch = pa.RecordBatch.from_pylist(values, fields)
    feature_table.write_part(feature_table.PartFile(str(parts), "abcd1234"), 3, iter([batch]))
    todo = pa.concat_tables([mine, done]).select(schema.PHOTOS.names)
    parquet.write_chunks(folder.work / "todo.arrow", todo, [0, 3])
    write_json(folder.work / "plan.json", {"photos": 54, "before": 51, "run": "abcd1234"})
    (parts / ".abcd1234-000004-x").write_bytes(SECRET[0].encode())
    (folder.work / "reduce-1").mkdir()
    (folder.work / "reduce-1" / "x.csv").write_text(SECRET[1])
    (folder.features / f".{'0' * 32}.part").write_text(SECRET[1])
    assert status(out)["todo"] == 1

    receipt = forget.forget(out, SECRET)
    assert receipt["rows"]["parts"] == 1
    assert hits(out, wanted) == {}
    assert [p.name for p in parts.iterdir()] == ["abcd1234-000003-1-0.parquet"]
    assert not (folder.work / "todo.arrow").exists()
    assert others(out) == before
    assert receipt["made_again"] == dict.fromkeys(
        ("reduce", "train", "report"), "no: extract isn't finished"
    )
    # 54 less five that are forgotten, two of which were among the three to do.
    plan = read_json(folder.work / "plan.json")
    assert (plan["photos"], plan["before"]) == (49, 48)
    assert status(out)["todo"] == 0
