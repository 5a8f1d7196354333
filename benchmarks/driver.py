"""What the driver needs for a list of N photos: seconds and peak memory of planning, without Spark.

The list is made up (no files): it is arranged, matched with a table that holds nine of ten photos,
and written out for the tasks, as ``extract`` does before and after Spark's part.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import common
from pomona.core.parquet import write_chunks
from pomona.core.schema import FILES
from pomona.photos import source
from pomona.pipeline.extract_task import task_bounds
from pomona.workspace import feature_table


def listing(count: int) -> pa.Table:
    """Make up a listing as long-named as Fruits-360's, in no order."""
    numbers = pa.array(np.random.default_rng(0).permutation(count))
    folder = pc.cast(pc.divide(numbers, 700), pa.string())
    paths = pc.binary_join_element_wise(
        "Training/Apple/Apple Variety ",
        folder,
        "/r0_",
        pc.cast(numbers, pa.string()),
        "_100.jpg",
        "",
    )
    sizes = pa.array(np.full(count, 5000))
    times = pa.array(np.full(count, 1_700_000_000_000_000)).cast(FILES.field("modified").type)
    return pa.table([paths, sizes, times], schema=FILES)


def index_of(photos: pa.Table) -> feature_table.Index:
    """Make up the index of a table that holds nine photos of ten."""
    held = photos.slice(0, photos.num_rows * 9 // 10)
    rows = held.append_column("error", pa.nulls(held.num_rows, pa.string()))
    rows = rows.append_column("file", pa.array(np.zeros(held.num_rows, np.int32)))
    rows = rows.append_column("row", pa.array(np.arange(held.num_rows)))
    return feature_table.Index(rows, ["features/split=Training/part-00000-00000.parquet"], 1)


def plan(count: int, folder: Path) -> dict[str, float]:
    """Return seconds by step."""
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - start
        return result

    files = listing(count)
    photos = timed("arrange", lambda: source.arrange(files))
    found = index_of(photos)
    rows = timed("match", lambda: feature_table.match(photos, found))
    todo = rows.filter(pc.is_null(rows["file"])).select(photos.column_names)
    bounds = task_bounds(count, 64, 512)
    timed("write the list", lambda: write_chunks(folder / "todo.arrow", photos, bounds))
    assert todo.num_rows == count - count * 9 // 10
    seconds["list on disk, MB"] = (folder / "todo.arrow").stat().st_size / 1e6
    return seconds


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--photos", type=common.positive, default=1_000_000, metavar="N", help="(default: 1000000)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = plan(options.photos, Path(folder))
    figures["peak RSS, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(common.table([f"{options.photos:,} photos", "seconds"], figures.items()))
    common.write_figures(options.json, {"photos": options.photos, **figures})
    return 0


if __name__ == "__main__":
    common.start(main)
