"""Reading from an object store that takes 30 ms to answer: READ_AHEAD reads in flight, or one.

A child serves rendered photos over HTTP as S3 does, on the loopback address, and sleeps before each
answer. Both ways read all photos through `pomona.photos.source`, in turn, in rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import multiprocessing
import os
import re
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow as pa
from PIL import Image

import common
from pomona.core.errors import RequestError
from pomona.core.object_store import READ_AHEAD
from pomona.photos import reading
from pomona.photos.source import Source, open_source

AHEAD = f"{READ_AHEAD} in flight"
ALONE = "one after another"
BATCH = 8
"""Photos in a record batch, as `pomona extract` has them on a CPU."""


# --- the store, in a child ---------------------------------------------------------------------


class Store(BaseHTTPRequestHandler):
    """As much of S3 as reading needs: HEAD, and GET of a range."""

    protocol_version = "HTTP/1.1"  # connections stay open, as S3's do
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body leave in one packet, or the client's ACK delays the second
    photos: dict[str, bytes]
    delay: float

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        time.sleep(self.delay)
        content = self.photos.get(self.path.split("?")[0])
        if content is None:
            self._say(404, b"", {}, with_body=False)
            return
        heads = {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if span is None:
            self._say(200, content, heads, with_body=with_body)
            return
        first, last = int(span[1]), min(int(span[2]), len(content) - 1)
        heads["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._say(206, content[first : last + 1], heads, with_body=with_body)

    def _say(self, code: int, body: bytes, heads: dict[str, str], *, with_body: bool) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Last-Modified", formatdate(0, usegmt=True))
        for name, value in heads.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        pass


def name_of(number: int) -> str:
    return f"photo{number:05d}.jpg"


def render(number: int) -> bytes:
    """Return a JPEG of about 5 KB."""
    noise = Image.effect_noise((100, 100), 40 + number % 20).convert("RGB")
    file = io.BytesIO()
    noise.save(file, "JPEG", quality=75)
    return file.getvalue()


def serve(to: Any, count: int, delay: float) -> None:
    """Serve so many photos until the process is ended, and tell the port and their mean size."""
    Store.photos = {f"/bucket/photos/{name_of(number)}": render(number) for number in range(count)}
    Store.delay = delay
    ThreadingHTTPServer.request_queue_size = 128
    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    to.send((server.server_port, sum(map(len, Store.photos.values())) / count))
    server.serve_forever()


@contextlib.contextmanager
def store(count: int, delay: float) -> Iterator[tuple[Source, float]]:
    """Give a source on a store of its own, and the photos' mean size in bytes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=serve, args=(theirs, count, delay), daemon=True)
    child.start()
    theirs.close()
    try:
        port, size = ours.recv()
        yield (
            open_source(
                f"s3://bucket/photos?endpoint_override=http://127.0.0.1:{port}"
                "&region=us-east-1&scheme=http"
            ),
            size,
        )
    except EOFError:
        raise RequestError("the store did not start; its traceback is above") from None
    finally:
        child.terminate()
        child.join()


# --- contenders --------------------------------------------------------------------------------


def read_ahead(source: Source, names: list[str]) -> list[bytes]:
    """Read as a worker does."""
    batches = (
        pa.record_batch({"path": names[at : at + BATCH]}) for at in range(0, len(names), BATCH)
    )
    return [c for rows in reading.read(batches, source) for c in rows["content"].to_pylist()]


def read_alone(source: Source, names: list[str]) -> list[bytes]:
    """Read one photo, then the next."""
    read = reading.reader(source)
    return [read(name) for name in names]


CONTENDERS = {AHEAD: read_ahead, ALONE: read_alone}


# --- the benchmark -----------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run both ways in turn and return the figures."""
    names = [name_of(number) for number in range(options.photos)]
    rounds: list[dict[str, float]] = []
    with store(options.photos, options.delay / 1000) as (source, size):
        read_ahead(source, names[:BATCH])  # Arrow starts its S3 client once
        for number in range(options.rounds):
            common.say(f"round {number + 1} of {options.rounds}")
            rounds.append({name: rate(name, source, names) for name in CONTENDERS})
    rates = common.medians(rounds)
    return {
        "photos": options.photos,
        "mean_bytes": size,
        "delay_ms": options.delay,
        "read_ahead": READ_AHEAD,
        "photos_per_second": rates,
        "rounds": rounds,
        "ratio": rates[AHEAD] / rates[ALONE],
    }


def rate(name: str, source: Source, names: list[str]) -> float:
    """Return photos per second, every photo's bytes checked to be there."""
    start = time.perf_counter()
    contents = CONTENDERS[name](source, names)
    seconds = time.perf_counter() - start
    if not all(contents) or len(contents) != len(names):
        raise RequestError(f"{name}: a photo was not read")
    return len(names) / seconds


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    print(
        f"{figures['photos']:,} photos of {figures['mean_bytes'] / 1000:.1f} KB; "
        f"{figures['delay_ms']:g} ms before each answer\n"
    )
    print(common.table(("reads", "photos/s"), figures["photos_per_second"].items()))
    print(f"\nratio: {figures['ratio']:.1f}")


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--photos", type=common.positive, default=400, metavar="N", help="(default: 400)"
    )
    parser.add_argument(
        "--delay", type=float, default=30, metavar="MS", help="before each answer (default: 30)"
    )
    common.add_rounds(parser, 3)
    options = parser.parse_args()
    os.environ.update(
        AWS_ACCESS_KEY_ID="nobody", AWS_SECRET_ACCESS_KEY="nothing", AWS_EC2_METADATA_DISABLED="1"
    )
    figures = measure(options)
    show(figures)
    common.write_figures(options.json, figures)
    return 0


if __name__ == "__main__":
    common.start(main)
