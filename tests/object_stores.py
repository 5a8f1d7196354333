"""Photos on an object store."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pomona.core.schema import FILES


def paths(files: pa.Table) -> list[str]:
    return sorted(files["path"].to_pylist())


def table(*names: str) -> pa.Table:
    size = len(names)
    columns = [list(names), [1] * size, pa.array([0] * size, FILES.field("modified").type)]
    return pa.table(columns, schema=FILES)


def upload(options: str, bucket: str, contents: dict[str, bytes]) -> None:
    from pyarrow.fs import FileSystem

    uri = f"s3://{bucket}?{options}&allow_bucket_creation=true&allow_delayed_open=true"
    filesystem: Any = FileSystem.from_uri(uri)[0]
    filesystem.create_dir(bucket)
    for key, content in contents.items():
        with filesystem.open_output_stream(f"{bucket}/{key}") as file:
            file.write(content)
