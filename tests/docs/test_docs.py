"""What the documents say is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from docs.generate_cli import text

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_cli_page_is_generated() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == text(), "run: make docs"


def test_every_module_is_on_the_layout_page() -> None:
    """Each module has one line of a room's table, and each line has its module."""
    package = ROOT / "src" / "pomona"
    page = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    rooms = page.split("\n## The rooms\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\| `(.+?\.py)` \|", rooms, re.M)
    modules = [
        module.relative_to(package).as_posix()
        for module in package.glob("*/**/*.py")
        if module.name != "__init__.py"
    ]
    assert sorted(lines) == sorted(modules)


def test_code_that_runs_on_workers_says_so() -> None:
    page = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    marked = set(re.findall(r"^\| `(.+?\.py)` \|.*\| (?:d, )?w \|$", page, re.M))
    package = ROOT / "src" / "pomona"
    says = {
        module.relative_to(package).as_posix()
        for module in package.glob("*/**/*.py")
        if "runs on workers" in " ".join(module.read_text(encoding="utf-8").lower().split())
    }
    assert says <= marked


def test_every_column_is_on_the_formats_page() -> None:
    from pomona.core import schema

    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    for table in (schema.FEATURES_TABLE, schema.PCA_TABLE, schema.REJECTED):
        for name in table.names:
            assert f"`{name}`" in page, name
    for code in schema.ERRORS:
        assert f"`{code}`" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_options_exist(page: Path) -> None:
    """Each `pomona …` line in a shell block parses: its command and its options are known."""
    known = text()
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words or words[0] != "pomona":
                continue
            names = [words[1:end] for end in (4, 2)]  # pomona cloud emr submit; pomona run
            name = next(n for n in names if f"## pomona {' '.join(n)}\n" in known)
            section = known.split(f"## pomona {' '.join(name)}\n", 1)[1].split("\n##", 1)[0]
            own, _, further = " ".join(words).partition(" -- ")  # further options: pomona run's
            for option in re.findall(r"(?<= )--[\w-]+", own):
                assert option in section, line
            for option in re.findall(r"--[\w-]+", further):
                assert option in known.split("## pomona run\n", 1)[1].split("\n##", 1)[0], line


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"`make (\w+)`", page.read_text(encoding="utf-8")):
            assert f"\n{target}:" in makefile, (page.name, target)
