"""An object store that fails: a share of requests throttled, broken, hanging, cut short or reset.

Rendered photos lie on a server that speaks S3, behind a proxy that lets a share of the requests
fail at first (`tests/faults.py`). `pomona extract` reads them undisturbed, then under faults; the
two tables must be the same.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import common
from pomona.core.errors import RequestError
from pomona.core.object_store import connect
from pomona.photos import synthetic
from pomona.pipeline.extract import ExtractOptions, extract
from pomona.spark.session import Cluster

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.faults import KINDS, Plan, proxy, share


def table(out: Path) -> pa.Table:
    """Read the table of features, without what hangs on the clock."""
    files = sorted((out / "features").glob("split=*/*.parquet"))
    rows = pa.concat_tables(pq.ParquetFile(file).read() for file in files)
    return rows.drop_columns("modified").combine_chunks()


def upload(source: Path, bucket: str, options: str) -> None:
    """Put the photos there."""
    store = connect(f"s3://{bucket}?{options}&allow_bucket_creation=true", writes=True)
    store.create_dir(bucket)
    for path in sorted(source.rglob("*.jpg")):
        with store.open_output_stream(f"{bucket}/{path.relative_to(source).as_posix()}") as file:
            file.write(path.read_bytes())


def plans(percent: float) -> dict[str, Plan]:
    """What goes wrong in each run."""
    return {
        "warm": share(0),
        "undisturbed": share(0),
        "faults, none hangs": share(percent, tuple(kind for kind in KINDS if kind != "hang")),
        "a fifth of them hang": share(percent),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Extract undisturbed and under faults, and compare."""
    from moto.server import ThreadedMotoServer

    seconds: dict[str, float] = {}
    faults: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        synthetic.synthesize(place / "photos", classes=20, images=options.photos)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        server.start()
        host, port = server.get_host_and_port()
        direct = f"endpoint_override=http://{host}:{port}&region=us-east-1&scheme=http"
        upload(place / "photos", "photos", direct)
        settings = ExtractOptions(weights="random:0", image_size=options.image_size)
        with proxy(direct) as gate:
            for name, plan in plans(options.percent).items():
                gate.reset(plan)
                common.say(name)
                start = time.perf_counter()
                record = extract(
                    f"s3://photos?{gate.options}", place / name, settings, Cluster("local[2]")
                )
                seconds[name] = time.perf_counter() - start
                if record["rejected"]:
                    raise RequestError(f"{name}: rejected {record['rejected']}")
                faults[name] = {"requests": sum(gate.asked.values()), **gate.faults}
        wanted = table(place / "undisturbed")
        same = all(table(place / name).equals(wanted) for name in seconds)
        server.stop()
    return {
        "photos": options.photos,
        "percent": options.percent,
        "faults": faults,
        "seconds": seconds,
        "same_table": same,
    }


def show(figures: dict[str, Any]) -> None:
    """Print what came."""
    print(f"{figures['photos']:,} photos, {figures['percent']:g} % of requests fail at first\n")
    for name, found in figures["faults"].items():
        print(f"{name}: {', '.join(f'{n:,} {kind}' for kind, n in found.items())}")
    print(common.table(("extract", "seconds"), figures["seconds"].items()))
    print(f"\nthe same table: {'yes' if figures['same_table'] else 'NO'}")


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--photos", type=common.positive, default=2000, help="(default: 2000)")
    parser.add_argument("--percent", type=float, default=5.0, help="of requests (default: 5)")
    parser.add_argument("--image-size", type=int, default=32, help="(default: 32)")
    options = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    os.environ.update(
        AWS_ACCESS_KEY_ID="nobody", AWS_SECRET_ACCESS_KEY="nothing", AWS_EC2_METADATA_DISABLED="1"
    )
    figures = measure(options)
    show(figures)
    common.write_figures(options.json, figures)
    return 0 if figures["same_table"] else 1


if __name__ == "__main__":
    common.start(main)
