"""The service under load, from another process: throughput, latency, memory, and its peers.

Side by side in one run, on the same photos and the same ``model.onnx``:

- the bare session, one thread for each core, with pixels ready, and with decoding;
- ``pomona serve``;
- the same model behind plain FastAPI, as one writes it first;
- the same model behind LitServe (``pip install litserve``; left out where it isn't there).

Saturation is a closed loop: so many connections, each with a request under way. For 50, 80 and
200 % of that rate requests come at random (Poisson) whether or not answers do, and a latency counts
from the time at which the request was due: a generator that waits for answers hides the queue.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import common
from pomona.backbone import extract
from pomona.core.cpus import available_cpus
from pomona.model import artifact
from pomona.photos.decoding import decode

HOST = "127.0.0.1"
RAW = "pomona, photo as the body"
"""The others get forms, which LitServe and most of those who write FastAPI take."""

PHOTOS = 400
"""Photos that requests take in turn."""


# --- contenders, each in a process of its own --------------------------------------------------


def bare(folder: str, photos: list[bytes], seconds: float, *, decoding: bool) -> float:
    """Return photos per second of the session alone, called by one thread for each core."""
    found = artifact.load_model(folder)
    spec = found.spec(device="cpu")
    run = extract.load_network(spec)
    ready = [decode(content, spec.image_size).pixels for content in photos]
    done = [0] * available_cpus()
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        n = number
        while time.perf_counter() < end:
            n = (n + 1) % len(photos)
            pixels = decode(photos[n], spec.image_size).pixels if decoding else ready[n]
            assert pixels is not None
            run(pixels[None])
            done[number] += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(done))]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - start)


def naive(folder: str, port: int) -> None:
    """Serve as one writes it first: a session with its defaults, called in the event loop."""
    import io

    import onnxruntime as ort
    import uvicorn
    from fastapi import FastAPI, File
    from PIL import Image

    found = artifact.load_model(folder)
    session = ort.InferenceSession(found.content, providers=["CPUExecutionProvider"])
    size = int(found.about["preprocessing"]["image_size"])
    app = FastAPI()

    @app.post("/v1/predict")
    async def predict(photo: bytes = File()) -> dict[str, Any]:
        image = Image.open(io.BytesIO(photo)).convert("RGB")
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
        (probabilities,) = session.run(["probabilities"], {"image": pixels[None]})
        best = int(probabilities[0].argmax())
        return {"label": found.labels[best], "probability": float(probabilities[0, best])}

    uvicorn.run(app, host=HOST, port=port, log_level="warning")


@contextlib.contextmanager
def served(name: str, folder: str) -> Iterator[tuple[int, psutil.Process]]:
    """Run a contender; gives its port and its process."""
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--child", name, "--model", folder, "--port", str(port)]
    if name == "litserve":
        script = str(Path(__file__).with_name("serve_litserve.py"))
        command = [sys.executable, script, folder, str(port)]
    if name in ("pomona", RAW):
        command = [sys.executable, "-m", "pomona", "serve", "--quiet"]
        command += ["--model", folder, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            _wait(process, port)
            yield port, psutil.Process(process.pid)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in psutil.Process(process.pid).children(recursive=True):
                    each.kill()
            process.kill()


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(600):
        if process.poll() is not None:
            assert process.stderr is not None
            raise SystemExit(process.stderr.read().decode()[-2000:])
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1):
            return
        time.sleep(0.1)
    raise SystemExit("a contender doesn't start")


# --- the generator, in a process of its own ----------------------------------------------------


class Client(asyncio.Protocol):
    """One connection with at most one request under way. As little work as can be."""

    def __init__(self) -> None:
        self.buffer = b""
        self.answer: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, mark, body = self.buffer.partition(b"\r\n\r\n")
        if not mark:
            return
        lower = head.lower()
        at = lower.index(b"content-length:") + 15
        length = int(lower[at : lower.find(b"\r", at) if b"\r" in lower[at:] else len(lower)])
        if len(body) >= length:
            self.buffer = b""
            self._say(int(head[9:12]))

    def connection_lost(self, error: Exception | None) -> None:
        self._say(0)

    def _say(self, status: int) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(status)

    async def ask(self, request: bytes) -> int:
        """Send a request; return its status, 0 where the connection broke."""
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.answer


def requests(photos: list[bytes], *, form: bool) -> list[bytes]:
    """Return whole requests, as bytes."""
    found = []
    for content in photos:
        body, kind = content, "image/jpeg"
        if form:
            kind = "multipart/form-data; boundary=x"
            head = 'Content-Disposition: form-data; name="photo"; filename="a.jpg"'
            body = f"--x\r\n{head}\r\nContent-Type: image/jpeg\r\n\r\n".encode() + content
            body += b"\r\n--x--\r\n"
        line = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
        found.append(f"{line}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return found


async def _connect(port: int) -> Client:
    _, client = await asyncio.get_running_loop().create_connection(Client, HOST, port)
    return client


async def closed(
    port: int, made: list[bytes], connections: int, seconds: float, count: int | None = None
) -> dict[str, Any]:
    """Keep so many requests under way, for so long or until so many are answered."""
    statuses: Counter[int] = Counter()
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def ask(first: int) -> None:
        client, n = await _connect(port), first
        while time.perf_counter() < end and (count is None or sum(statuses.values()) < count):
            begun = time.perf_counter()
            status = await client.ask(made[n % len(made)])
            statuses[status] += 1
            latencies.append(time.perf_counter() - begun)
            n += connections

    start = time.perf_counter()
    await asyncio.gather(*(ask(n) for n in range(connections)))
    return _figures(statuses, latencies, latencies, time.perf_counter() - start)


async def opened(port: int, made: list[bytes], rate: float, seconds: float) -> dict[str, Any]:
    """Send requests at random times, so many a second, whether or not answers come."""
    chance = random.Random(0)
    statuses: Counter[int] = Counter()
    answered: list[float] = []
    refused: list[float] = []
    idle: list[Client] = [await _connect(port) for _ in range(16)]
    under_way = set()

    async def ask(due: float, n: int) -> None:
        client = idle.pop() if idle else await _connect(port)
        status = await client.ask(made[n % len(made)])
        statuses[status] += 1
        (answered if status == 200 else refused).append(time.perf_counter() - due)
        if status:
            idle.append(client)

    start = due = time.perf_counter()
    n = 0
    while due < start + seconds:
        due += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(ask(due, n))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        n += 1
    await asyncio.gather(*under_way)
    return _figures(statuses, answered, refused, time.perf_counter() - start)


def _figures(
    statuses: Counter[int], answered: list[float], refused: list[float], seconds: float
) -> dict[str, Any]:
    return {
        "statuses": dict(statuses),
        "answers_per_second": statuses[200] / seconds,
        **{f"p{q}": _quantile(answered, q) for q in (50, 95, 99)},
        "refused_p99": _quantile(refused, 99) if set(statuses) - {200} else None,
    }


def _quantile(values: list[float], q: int) -> float | None:
    return 1e3 * float(np.quantile(values, q / 100)) if values else None


def generate(port: int, photos: str, form: bool, load: dict[str, Any]) -> dict[str, Any]:
    """Run the generator in another process."""
    command = [sys.executable, __file__, "--child", "load", "--photos", photos, "--port", str(port)]
    command += ["--load", json.dumps(load), *(["--form"] if form else [])]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(ran.stderr[-2000:])
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def _generate_here(port: int, photos: list[bytes], form: bool, load: dict[str, Any]) -> Any:
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    made = requests(photos, form=form)
    work = opened if "rate" in load else closed
    return asyncio.run(work(port, made, **load))


# --- the run -----------------------------------------------------------------------------------


def read(source: str) -> list[bytes]:
    """Return photos, evenly spread over the folder."""
    paths = sorted(Path(source).rglob("*.jpg"))
    return [paths[len(paths) * n // PHOTOS].read_bytes() for n in range(min(PHOTOS, len(paths)))]


def memory(process: psutil.Process) -> float:
    """Return what a process and its children hold, MB."""
    every = [process, *process.children(recursive=True)]
    return float(sum(each.memory_info().rss for each in every)) / 1e6


def compare(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Return photos per second of each contender: medians over rounds, taken in turn."""
    found: dict[str, list[float]] = {}
    latest: dict[str, Any] = {}
    for _ in range(args.rounds):
        for kind in ("pixels", "decoding"):
            command = [sys.executable, __file__, "--child", "bare", "--model", args.model]
            command += ["--photos", args.source, "--load", json.dumps({"seconds": args.seconds})]
            command += ["--decode"] if kind == "decoding" else []
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
            found.setdefault(f"bare session, {kind}", []).append(float(ran.stdout))
        for name in names:
            with served(name, args.model) as (port, process):
                load = {"connections": args.connections, "seconds": 3.0}
                generate(port, args.source, name != RAW, load)  # warm
                load["seconds"] = args.seconds
                got = generate(port, args.source, name != RAW, load)
                found.setdefault(name, []).append(got["answers_per_second"])
                latest[name] = {**got, "memory_mb": memory(process)}
    rates = {name: statistics.median(values) for name, values in found.items()}
    return {"photos_per_second": rates, "rounds": found, "saturated": latest}


def under_load(args: argparse.Namespace, names: list[str], capacity: float) -> dict[str, Any]:
    """Return latencies at shares of Pomona's capacity."""
    found: dict[str, Any] = {}
    for name in names:
        with served(name, args.model) as (port, process):
            generate(port, args.source, name != RAW, {"connections": 4, "seconds": 3.0})
            for share in (0.5, 0.8, 2.0):
                load = {"rate": share * capacity, "seconds": args.seconds}
                got = generate(port, args.source, name != RAW, load)
                found.setdefault(name, {})[f"{share:.0%}"] = {**got, "memory_mb": memory(process)}
    return found


def growth(args: argparse.Namespace) -> dict[str, Any]:
    """Return Pomona's memory before, and after so many requests."""
    with served("pomona", args.model) as (port, process):
        load: dict[str, Any] = {"connections": args.connections, "seconds": 3600.0, "count": 500}
        generate(port, args.source, True, load)
        before = memory(process)
        load["count"] = args.requests
        got = generate(port, args.source, True, load)
        with urllib.request.urlopen(f"http://{HOST}:{port}/readyz") as reply:
            ready = reply.status == 200
        return {**got, "before_mb": before, "after_mb": memory(process), "ready": ready}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", help="a folder of photos")
    parser.add_argument("--model", required="--child" not in sys.argv, help="OUT/model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--requests", type=int, default=20_000, help="of the memory's measurement")
    parser.add_argument("--json", type=Path, help="a file that takes the figures")
    for hidden in ("--child", "--photos", "--load"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    for hidden in ("--form", "--decode"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "naive":
        naive(args.model, args.port)
    elif args.child == "bare":
        load = json.loads(args.load)
        print(bare(args.model, read(args.photos), load["seconds"], decoding=args.decode))
    elif args.child == "load":
        found = _generate_here(args.port, read(args.photos), args.form, json.loads(args.load))
        print(json.dumps(found))
    else:
        run(args)


def run(args: argparse.Namespace) -> None:
    """Measure everything, and print it."""
    names = [RAW, "pomona", "naive"]
    with contextlib.suppress(ImportError):
        import litserve

        names.append(litserve.__name__)
    compared = compare(args, names)
    rates = compared["photos_per_second"]
    best = rates["bare session, pixels"]
    decoding = rates["bare session, decoding"]
    rows = [
        (name, f"{r:.1f}", f"{r / best:.2f}", f"{r / decoding:.2f}") for name, r in rates.items()
    ]
    print(common.table(("", "photos/s", "of bare, pixels", "of bare, decoding"), rows))
    loads = under_load(args, names[1:], rates["pomona"])
    head = (
        "at a share of Pomona's rate",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "200",
        "503",
        "other",
        "MB",
    )
    print(common.table(head, _latency_rows(loads)))
    grown = growth(args)
    print(
        f"\nmemory of pomona serve: {grown['before_mb']:.0f} MB after 500 requests, "
        f"{grown['after_mb']:.0f} MB after {args.requests:,} more; ready: {grown['ready']}"
    )
    figures = {"compared": compared, "loads": loads, "memory": grown}
    common.write_figures(args.json, {"machine": common.machine(), **figures})


def _latency_rows(loads: dict[str, Any]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for name, shares in loads.items():
        for share, got in shares.items():
            statuses = {int(status): count for status, count in got["statuses"].items()}
            counts = [statuses.pop(200, 0), statuses.pop(503, 0), sum(statuses.values())]
            times = [f"{got[q]:.1f}" if got[q] else "" for q in ("p50", "p95", "p99")]
            rows.append((f"{name}, {share}", *times, *counts, f"{got['memory_mb']:.0f}"))
    return rows


if __name__ == "__main__":
    main()
