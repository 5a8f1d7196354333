"""Photos to features with Daft: ``python peer_daft.py FOLDER MODEL.onnx OUT PROCESSES``.

Started by peers.py in an environment of its own, without Pomona.
"""

from __future__ import annotations

import sys

import daft
from daft import DataType, Series

from peer_network import Network

Features = DataType.list(DataType.float32())


def main(folder: str, model: str, out: str, processes: int) -> None:
    @daft.cls(max_concurrency=processes, use_process=True)
    class Extractor:
        def __init__(self) -> None:
            self.network = Network(model)

        @daft.method.batch(return_dtype=Features, batch_size=64)
        def features(self, contents: Series) -> list[list[float] | None]:
            return self.network.features(contents.to_pylist())

    extractor = Extractor()
    frame = daft.from_glob_path(f"{folder}/**/*.jpg").select("path")
    frame = frame.with_column("features", extractor.features(frame["path"].download()))
    frame.write_parquet(out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
