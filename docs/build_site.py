"""Build the documentation as a site, into ``site/``: ``python docs/build_site.py``.

The pages are those of docs/ and the Markdown files that live elsewhere in the repository. They are
copied to one folder, because a site generator takes pages from one, and their links are turned to
the copies. Zensical then builds the site by mkdocs.yml, with warnings as errors: it checks every
link and anchor between the pages.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmark-scripts.md",
    "src/pomona/data/README.md": "fruits.md",
}
"""Pages outside docs/, and their names on the site."""

LINK = re.compile(r"""(?P<before>\]\(|\b(?:src|href)=")(?!https?:|mailto:|#)(?P<path>[^)#"\s]+)""")


def pages() -> dict[Path, str]:
    """Return every Markdown page of the repository that is on the site, and its name there."""
    own = {page: page.name for page in sorted((ROOT / "docs").glob("*.md"))}
    return own | {ROOT / path: name for path, name in ELSEWHERE.items()}


def collect(to: Path) -> None:
    """Copy the pages, and the files that they link to, into a new folder."""
    names = pages()
    for page, name in names.items():

        def on_site(link: re.Match[str], page: Path = page) -> str:
            target = Path(os.path.normpath(page.parent / link["path"]))
            if target in names:
                return link["before"] + names[target]
            if not target.is_file():
                raise SystemExit(f"{page.relative_to(ROOT)}: no such file: {link['path']}")
            copy = to / "files" / target.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(target, copy)
            return f"{link['before']}files/{target.name}"

        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_text(LINK.sub(on_site, page.read_text("utf-8")), encoding="utf-8")


def build(to: Path) -> None:
    """Build the site into a folder, which is replaced. Ends the process if a page is wrong."""
    if importlib.util.find_spec("zensical") is None:
        raise SystemExit("the site needs Zensical, of the extra dev, on Python 3.11 or newer")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        collect(work / "pages")
        shutil.copy(ROOT / "mkdocs.yml", work)
        words = [sys.executable, "-m", "zensical", "build", "--strict"]
        if subprocess.run(words, cwd=work, check=False).returncode:
            raise SystemExit("the site is not built: see above")
        shutil.rmtree(to, ignore_errors=True)
        shutil.move(work / "site", to)


if __name__ == "__main__":
    build(ROOT / "site")
