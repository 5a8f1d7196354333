"""The tutorial and the README, command by command, on rendered photos."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from pomona.photos.synthetic import synthesize
from tests.conftest import photo
from tests.docs.blocks import ROOT, Reader, commands

pytest.importorskip("sklearn")
pytest.importorskip("fastapi")

PIECES = 4
EACH = 6
"""More than 50 Training photos in all: `reduce` keeps 50 components."""


def photograph(folder: Path) -> None:
    """Lay out photos as the tutorial says: kinds, pieces, one piece of each kind for Test."""
    rendered = folder / "rendered"
    synthesize(rendered, classes=3, images=3 * 2 * PIECES * EACH, workers=1)
    for kind in sorted((rendered / "Training").iterdir()):
        files = sorted(kind.iterdir())
        assert len(files) >= PIECES * EACH
        for n, file in enumerate(files[: PIECES * EACH]):
            piece = n // EACH + 1
            split = "Test" if piece == PIECES else "Training"
            to = folder / "photos" / split / kind.name / f"piece-{piece}"
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, to)
    shutil.copy(file, folder / "question.jpg")
    (folder / "other").mkdir()
    for n in range(3):
        (folder / "other" / f"{n}.jpg").write_bytes(photo(n))


@pytest.mark.slow
def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    photograph(tmp_path)
    reader = Reader(tmp_path)
    printed: dict[str, str] = {}
    try:
        for line in commands((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")):
            printed[line] = reader.run(line)
            if line.startswith("cd "):  # the reader's photos lie in the new folder
                for name in ("photos", "other", "question.jpg"):
                    shutil.move(tmp_path / name, reader.folder / name)
    finally:
        reader.stop()

    def said(start: str) -> str:
        return next(text for line, text in printed.items() if line.startswith(start))

    assert "72" in said("pomona inspect")
    (answer,) = json.loads(said("curl"))["answers"]
    assert answer["error"] is None
    answers = [json.loads(line) for line in said("pomona predict other").splitlines()]
    assert len(answers) == 3 and all(row["unknown"] for row in answers)
    results = reader.folder / "results"
    assert (results / "report" / "report.html").exists()
    assert {path.name for path in (reader.folder / "website").iterdir()} >= {"index.html"}


@pytest.mark.slow
def test_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands print what it shows, but for figures of the machine; then its Python runs."""
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    reader = Reader(tmp_path)
    try:
        printed = " ".join("".join(map(reader.run, commands(page))).split())
        (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
        (tmp_path / "readme.py").write_text(block)
        said = reader.run("python readme.py")
    finally:
        reader.stop()
    assert "(1280,)" in said and "photos/Test" in said
    shown = page.split("# what they print, shortened\n")[1].split("```")[0].splitlines()
    for line in shown[:4]:
        assert " ".join(line.split()) in printed, line
    assert "photos/Test/Banana/18_100.jpg Banana" in printed
