"""The page that recognises fruit: its files, with the service or as static files for any host.

The sources lie in ``assets/`` and are served as they are; there is no build. What differs from page
to page is ``config.json``, ``device/`` (the model's file for the browser and what reads its
outcome) and the list of digests at the head of ``sw.js``. ``runtime/`` is the ONNX Runtime for
browsers, which ``tools/runtime.py`` puts into ``assets/runtime``; without it the device mode is
off.

All addresses are relative: the same files work under any folder of a host.
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

import numpy as np
import numpy.typing as npt

from pomona.backbone import mobilenet
from pomona.backbone.session import onnx_session
from pomona.core.errors import MissingError, RequestError
from pomona.core.files import atomic_folder, sha256
from pomona.core.provenance import versions
from pomona.model.artifact import Model
from pomona.model.head import ANSWER
from pomona.model.recogniser import why

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
"""What goes with every file of the page."""

ABOUT = "config.json"
RECORD = "page.json"
"""Beside static files: which ones are the page's."""
SHOWN = 8
"""Labels that the page names before the first photo."""
REMEDY = "run make runtime in Pomona's repository (it needs npm's registry once)"


@dataclass(frozen=True)
class File:
    """One file of the page.

    Attributes
    ----------
    content
        The bytes, or the path of a file that holds them.
    media_type
        For Content-Type.
    lasting
        Its address changes with its content: it may be cached for as long as one likes. All else
        has to be asked for again each time (``no-cache``, with `digest` as ETag).
    guarded
        Only for those who have the key.
    """

    content: bytes | Path
    media_type: str
    lasting: bool = False
    guarded: bool = False

    def read(self) -> bytes:
        """Return the bytes."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()

    @cached_property
    def digest(self) -> str:
        """The first digits of the content's SHA-256."""
        return hashlib.sha256(self.read()).hexdigest()[:16]

    @property
    def headers(self) -> dict[str, str]:
        """What goes with this file beside `HEADERS` and its type."""
        if not self.lasting:
            return {"Cache-Control": "no-cache", "ETag": f'"{self.digest}"'}
        whose = "private" if self.guarded else "public"
        return {"Cache-Control": f"{whose}, max-age=31536000, immutable"}


Site = dict[str, File]


def site(found: Model, phone: bytes, *, service: bool, needs_key: bool = False) -> Site:
    """Return the page's files by their paths; ``index.html`` is also what ``/`` shows.

    Parameters
    ----------
    phone
        The model's file for the device.
    service
        With a service behind it, that answers at ``v1/predict``; without, only the device mode.
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
        files |= _runtime() | _device(found, phone, guarded=needs_key)
    about = {
        "service": service,
        "key": needs_key,
        "device": not missing,
        "device_reason": missing,
        "runtime": {"folder": f"runtime/{RUNTIME}/", "bytes": _packed(files)},
        "pomona": versions().get("pomona"),
        **({} if needs_key else _knows(found.labels)),
    }
    files[ABOUT] = _json(about)
    return files | {"sw.js": _service_worker(files)}


def _knows(labels: tuple[str, ...]) -> dict[str, Any]:
    """Return some labels, evenly spread over all, and how many there are."""
    count = len(labels)
    take = min(count, SHOWN)
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
    """Set what the worker has to know before its code: it changes when any file does."""
    listed = {n: f.digest for n, f in sorted(files.items()) if not f.guarded and n != "sw.js"}
    whole = hashlib.sha256(json.dumps(listed).encode() + files["sw.js"].read()).hexdigest()
    known = {
        "FILES": {"version": whole[:12], "digests": listed},
        "GUARDED": sorted(name for name, file in files.items() if file.guarded),
        "DRESS": {name: value for name, value in HEADERS.items() if "Cross-Origin" in name},
    }
    head = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in known.items())
    return File(head.encode() + files["sw.js"].read(), TYPES[".js"])


# --- on the device -----------------------------------------------------------------------------


def missing_runtime() -> str | None:
    """Return why there is no device mode, with the remedy, or None where all is there."""
    folder = _folder() / "runtime"
    try:
        about = json.loads((folder / "runtime.json").read_bytes())
    except (OSError, ValueError):
        return f"the ONNX Runtime for browsers isn't in this installation: {REMEDY}"
    if about["version"] != RUNTIME:
        return f"the ONNX Runtime for browsers is {about['version']}, not {RUNTIME}: {REMEDY}"
    for name, digest in about["files"].items():
        path = folder / name
        if not path.is_file() or sha256(path) != digest:
            return f"{name} of the ONNX Runtime for browsers is missing or damaged: {REMEDY}"
    return None


def _runtime() -> Site:
    folder = _folder() / "runtime"
    names = json.loads((folder / "runtime.json").read_bytes())["files"]
    return {f"runtime/{RUNTIME}/{name}": _file(folder / name, lasting=True) for name in names}


def _packed(files: Site) -> dict[str, int]:
    """Return how many bytes the page will load, so that it can say how far it is."""
    return {name: len(file.read()) for name, file in files.items() if name.endswith(".wasm.gz")}


def _device(found: Model, content: bytes, *, guarded: bool) -> Site:
    digest = hashlib.sha256(content).hexdigest()
    name = f"phone-{digest[:12]}.onnx"
    size = int(found.about["preprocessing"]["image_size"])
    unknown = found.about["unknown"]
    about = {
        "file": name,
        "bytes": len(content),
        "sha256": digest,
        "version": found.version,
        "labels": list(found.labels),
        "threshold": float(unknown["threshold"]),
        "reason": why(unknown["method"]),
        "size": size,
        "probe": _probe(content, size),
    }
    return {
        "device/device.json": _json(about, guarded=guarded),
        f"device/{name}": File(content, TYPES[".onnx"], lasting=True, guarded=guarded),
    }


def _probe(content: bytes, size: int) -> dict[str, Any]:
    """Return what the file says of `pattern`: the page checks its runtime by it."""
    outcome = onnx_session(content).run(list(ANSWER), {mobilenet.INPUT: pattern(size)[None]})
    probabilities, score = (np.asarray(part)[0] for part in outcome)
    return {"probabilities": [float(p) for p in probabilities], "score": float(score)}


def pattern(size: int) -> npt.NDArray[np.uint8]:
    """Return a picture [size, size, 3] that the page makes by the same formula (``worker.js``)."""
    y, x, c = np.ogrid[:size, :size, :3]
    picture: npt.NDArray[np.uint8] = ((3 * x + 5 * y + 80 * c) % 256).astype(np.uint8)
    return picture


# --- as static files ---------------------------------------------------------------------------


def refuse_foreign(dest: Path) -> None:
    """Raise a RequestError if the folder holds anything that `write` didn't put there."""
    if dest.exists() and not dest.is_dir():
        raise RequestError(f"{dest} is a file: --web is a folder")
    try:
        ours = set(json.loads((dest / RECORD).read_bytes())["files"])
    except (OSError, ValueError, TypeError, KeyError):
        ours = set()
    there = {path.relative_to(dest).as_posix() for path in dest.rglob("*") if not path.is_dir()}
    if foreign := sorted(there - ours):
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
