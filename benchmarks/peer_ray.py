"""Photos to features with Ray Data: ``python peer_ray.py FOLDER MODEL.onnx OUT PROCESSES``.

Started by peers.py in an environment of its own, without Pomona.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import ray

from peer_network import Network


class Extractor:
    def __init__(self, model: str) -> None:
        self.network = Network(model)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = self.network.features(list(batch["bytes"]))
        zeros = np.zeros(1280, np.float32)
        features = np.stack([zeros if row is None else np.asarray(row) for row in rows])
        return {"path": batch["path"], "features": features}


def main(folder: str, model: str, out: str, processes: int) -> None:
    # With as many CPUs as actors, Ray has none left to read with and waits for ever.
    ray.init(num_cpus=processes + 2, include_dashboard=False, logging_level="ERROR")
    photos = ray.data.read_binary_files(folder, include_paths=True, file_extensions=["jpg"])
    rows = photos.map_batches(
        Extractor, fn_constructor_args=(model,), concurrency=processes, batch_size=64, num_cpus=1
    )
    rows.write_parquet(out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
