"""Which photos are meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomona.core.errors import RequestError
from pomona.core.files import read_json
from pomona.privacy import forget
from pomona.privacy.forget import ForgetOptions
from tests.privacy.conftest import QUIET, SECRET


def test_patterns(out: Path) -> None:
    plan = forget.forget(out, ["Training/*/kind 0/[04].jpg"], ForgetOptions(dry_run=True))
    assert plan["photos"] == 6
    plan = forget.forget(out, ["**/7.jpg"], ForgetOptions(dry_run=True))
    assert plan["photos"] == 6
    source = read_json(out / "features" / "_table.json")["source"]
    plan = forget.forget(out, [f"{source}/{SECRET[0]}"], ForgetOptions(dry_run=True))
    assert plan["paths"] == [SECRET[0]]
    for pattern in ("Training/*.jpg", "training/**", "*7.jpg", "[x].jpg", "[", "a[]b"):
        with pytest.raises(RequestError, match=r"matches no photo in .*\*\* crosses folders"):
            forget.forget(out, [pattern], QUIET)
    with pytest.raises(RequestError, match=r"neither in the tables of .* nor in its source"):
        forget.forget(out, [SECRET[0], "Training/no.jpg"], QUIET)
    with pytest.raises(RequestError, match="neither in the tables"):  # a list holds no patterns
        forget.forget(out, [], ForgetOptions(listed=("**/7.jpg",)))
    with pytest.raises(RequestError, match="forget takes photos"):
        forget.forget(out)
    assert not (out / "forgotten").exists()
