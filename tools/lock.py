"""Write ``deploy/*.txt``: every package of the images, by version and by hash (``make lock``).

The versions are those of ``constraints.txt``. pip refuses what has another hash, and with
``--require-hashes`` what has none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LOCKS = {
    "cluster": ("pyproject.toml", "--extra=spark", "--extra=train", "--extra=report",
                "--python-version=3.10",
                "--no-emit-package=pyspark", "--no-emit-package=py4j"),
    "notebook": ("pyproject.toml", "deploy/jupyter.txt", "--extra=notebook",
                 "--python-version=3.11"),
    "gpu": ("deploy/gpu.in", "--python-version=3.11"),
}  # fmt: skip
"""By name: what is wanted, and the oldest Python of the images. A cluster has its own PySpark."""

HEAD = """\
# By `make lock`: what {name} images install, with hashes (pip install --require-hashes).
"""


def main() -> None:
    """Write all locks. Packages come from the index that pip is set to."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    told = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
        capture_output=True,
        text=True,
        check=False,
    )
    index = os.environ.get("PIP_INDEX_URL") or told.stdout.strip()
    environment = {"UV_DEFAULT_INDEX": index} if index else {}
    for name, words in LOCKS.items():
        locked = subprocess.run(
            [uv, "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-header",
             "--no-annotate", "--constraint=constraints.txt", *words],
            cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        (ROOT / "deploy" / f"{name}.txt").write_text(HEAD.format(name=name) + locked.stdout)


if __name__ == "__main__":
    main()
