"""The public names: there, documented, light, and enough for the notebook and the documents."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pomona

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name for name in pomona.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_there_and_documented(name: str) -> None:
    thing = getattr(pomona, name)
    assert inspect.getdoc(thing), name
    assert f"`{name}" in (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "src/pomona/__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == pomona._HOME
    assert sorted([*seen, "__version__"]) == sorted(pomona.__all__)


def test_importing_costs_nothing() -> None:
    script = "import sys, pomona; print([m for m in sys.modules if m.startswith('pomona.')])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pomona.nothing  # noqa: B018


def imports(code: str) -> set[str]:
    """Return the modules of pomona that code imports."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return {name for name in names if name.split(".")[0] == "pomona"}


def test_notebook_and_documents_import_pomona_alone() -> None:
    notebook = json.loads((ROOT / "notebooks" / "pomona.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert imports("\n".join(cells)) == {"pomona"}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            assert imports(block) <= {"pomona"}, page.name


@pytest.mark.slow
def test_the_pages_blocks_run(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    pomona.synthesize(tmp_path / "photos", classes=3, images=45, workers=1)
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "(1280,)" in done.stdout
