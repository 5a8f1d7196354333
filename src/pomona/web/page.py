"""Lay out the files of the page that recognises fruit, for the service or for a static host.

The sources lie in ``assets/`` and are served as they are; there is no build step. What differs from
page to page is ``config.json``, ``device/`` (the model's file for the browser, and what is needed
to read its outputs) and the list of digests at the head of ``sw.js``. ``runtime/`` is the ONNX
Runtime for browsers, which ``tools/runtime.py`` puts into ``assets/runtime``; without it the device
mode is off.

All addresses are relative, so that the files work under any folder of a host.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from pomona.core.errors import MissingError, RequestError
from pomona.core.files import atomic_folder, sha256
from pomona.core.provenance import versions

log = logging.getLogger("pomona.web.page")

RUNTIME = "1.30.0"
"""The version of ONNX Runtime for browsers (npm's onnxruntime-web); `package.json` pins it."""

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".onnx": "application/octet-stream",
    ".gz": "application/gzip",
}

_POLICY = {
    "default-src": "'none'",
    "script-src": "'self' 'wasm-unsafe-eval'",
    "style-src": "'self'",
    "img-src": "'self' blob:",
    "connect-src": "'self'",
    "worker-src": "'self'",
    "manifest-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
}
POLICY = "; ".join(f"{name} {value}" for name, value in _POLICY.items())
"""The page's Content Security Policy, as far as a meta tag may hold one."""

HEADERS = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    # Both make the page cross-origin isolated: only then are there threads in WebAssembly.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
"""Headers of every file of the page."""

CONFIG = "config.json"
RECORD = "page.json"
"""Beside static files: the list of the files that are the page's."""
SHOWN = 8
"""Labels that the page names before the first photo."""
REMEDY = "run make runtime in Pomona's repository (it needs npm's registry once)"


@dataclass(frozen=True)
class File:
    """One file of the page.

    The address of a lasting file changes with its content, so it may be cached without limit. All
    other files have to be revalidated each time (``no-cache``, with `digest` as ETag).
    """

    content: bytes | Path  # the bytes, or the path of a file that holds them
    media_type: str
    lasting: bool = False
    guarded: bool = False  # only for clients that have the key

    def read(self) -> bytes:
        """Return the bytes."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()

    @cached_property
    def digest(self) -> str:
        """The first digits of the content's SHA-256."""
        return hashlib.sha256(self.read()).hexdigest()[:16]

    @property
    def headers(self) -> dict[str, str]:
        """The file's own headers, beside `HEADERS` and its type."""
        if not self.lasting:
            return {"Cache-Control": "no-cache", "ETag": f'"{self.digest}"'}
        whose = "private" if self.guarded else "public"
        return {"Cache-Control": f"{whose}, max-age=31536000, immutable"}


Site = dict[str, File]


def site(content: bytes, record: dict[str, Any], *, service: bool, needs_key: bool = False) -> Site:
    """Return the page's files by their paths; ``index.html`` is also what ``/`` shows.

    Parameters
    ----------
    content
        The ONNX file of the model that the page runs on the device.
    record
        What ``device/device.json`` says beside the file's name and digest: ``version``,
        ``labels``, ``threshold``, ``reason``, ``size`` and ``probe``, as ``worker.js`` reads them.
    service
        Whether a service that answers at ``v1/predict`` is behind the page; without one there is
        only the device mode.
    needs_key
        Whether the service asks for a key.

    Raises
    ------
    MissingError
        If the runtime for browsers isn't there and there is no service that could answer instead.
    """
    missing = missing_runtime()
    if missing and not service:
        raise MissingError(f"the page has no way to answer: {missing}")
    files = _sources(service=service)
    if missing:
        log.warning("the page won't answer on the device: %s", missing)
    else:
        files |= _runtime() | _device(content, record, guarded=needs_key)
    # How many bytes of the runtime the page will load, for its progress bar.
    packed = {name: len(file.read()) for name, file in files.items() if name.endswith(".wasm.gz")}
    config = {
        "service": service,
        "key": needs_key,
        "device": not missing,
        "device_reason": missing,
        "runtime": {"folder": f"runtime/{RUNTIME}/", "bytes": packed},
        "pomona": versions().get("pomona"),
        **({} if needs_key else _examples(record["labels"])),
    }
    files[CONFIG] = _json(config)
    return files | {"sw.js": _service_worker(files)}


def _examples(labels: list[str]) -> dict[str, Any]:
    """Return some labels, evenly spread over all, and how many there are: the page names them."""
    count, take = len(labels), min(len(labels), SHOWN)
    return {"labels": [labels[n * count // take] for n in range(take)], "count": count}


def _sources(*, service: bool) -> Site:
    folder = _folder()
    files = {path.name: _file(path) for path in sorted(folder.iterdir()) if path.suffix in TYPES}
    if not service:  # a static host sends no headers of ours
        meta = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        page = files["index.html"].read().decode().replace("<head>", f"<head>\n{meta}", 1)
        files["index.html"] = File(page.encode(), TYPES[".html"])
    return files


def _folder() -> Path:
    return Path(str(resources.files("pomona.web") / "assets"))


def _file(path: Path, *, lasting: bool = False) -> File:
    return File(path, TYPES[path.suffix], lasting)


def _json(value: Any, *, guarded: bool = False) -> File:
    content = json.dumps(value, ensure_ascii=False, indent=1).encode()
    return File(content, TYPES[".json"], guarded=guarded)


def _service_worker(files: Site) -> File:
    """Put the digests of all files before the worker's code: it changes when any file does."""
    digests = {n: f.digest for n, f in sorted(files.items()) if not f.guarded and n != "sw.js"}
    whole = hashlib.sha256(json.dumps(digests).encode() + files["sw.js"].read()).hexdigest()
    constants = {
        "FILES": {"version": whole[:12], "digests": digests},
        "GUARDED": sorted(name for name, file in files.items() if file.guarded),
        "DRESS": {name: value for name, value in HEADERS.items() if "Cross-Origin" in name},
    }
    head = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in constants.items())
    return File(head.encode() + files["sw.js"].read(), TYPES[".js"])


def missing_runtime() -> str | None:
    """Return why there is no device mode, with the remedy, or None where all is there."""
    folder = _folder() / "runtime"
    try:
        runtime = json.loads((folder / "runtime.json").read_bytes())
    except (OSError, ValueError):
        return f"the ONNX Runtime for browsers isn't in this installation: {REMEDY}"
    if runtime["version"] != RUNTIME:
        return f"the ONNX Runtime for browsers is {runtime['version']}, not {RUNTIME}: {REMEDY}"
    for name, digest in runtime["files"].items():
        path = folder / name
        if not path.is_file() or sha256(path) != digest:
            return f"{name} of the ONNX Runtime for browsers is missing or damaged: {REMEDY}"
    return None


def _runtime() -> Site:
    folder = _folder() / "runtime"
    names = json.loads((folder / "runtime.json").read_bytes())["files"]
    return {f"runtime/{RUNTIME}/{name}": _file(folder / name, lasting=True) for name in names}


def _device(content: bytes, record: dict[str, Any], *, guarded: bool) -> Site:
    digest = hashlib.sha256(content).hexdigest()
    name = f"phone-{digest[:12]}.onnx"
    record = {"file": name, "bytes": len(content), "sha256": digest, **record}
    return {
        "device/device.json": _json(record, guarded=guarded),
        f"device/{name}": File(content, TYPES[".onnx"], lasting=True, guarded=guarded),
    }


def refuse_foreign(dest: Path) -> None:
    """Raise a RequestError if the folder holds anything that `write` didn't put there."""
    if dest.exists() and not dest.is_dir():
        raise RequestError(f"{dest} is a file: --web is a folder")
    try:
        ours = set(json.loads((dest / RECORD).read_bytes())["files"])
    except (OSError, ValueError, TypeError, KeyError):
        ours = set()
    present = {path.relative_to(dest).as_posix() for path in dest.rglob("*") if not path.is_dir()}
    if foreign := sorted(present - ours):
        raise RequestError(
            f"{dest} holds {foreign[0]}, which isn't the page's, and it would be replaced: choose "
            "a new folder"
        )


def write(dest: Path, files: Site) -> None:
    """Write the page into a folder, whole or not at all. A page that is there is replaced.

    Raises
    ------
    RequestError
        If the folder holds other files, or can't be written.
    """
    refuse_foreign(dest)
    record = json.dumps({"files": [*sorted(files), RECORD]}, indent=1).encode()
    with atomic_folder(dest, "--web") as staged:
        for name, content in {**{n: f.read() for n, f in files.items()}, RECORD: record}.items():
            path = staged / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
