"""The columns of every table, declared once; Spark's DDL is derived from them."""

from __future__ import annotations

import pyarrow as pa

FEATURES = 1280
"""Width of the backbone's output, MobileNetV2 1.0 (Sandler et al. 2018, table 2)."""

SPLITS = ("Training", "Test")

UNREADABLE = "unreadable"
EMPTY = "empty"
NOT_AN_IMAGE = "not_an_image"
TRUNCATED = "truncated"
TOO_LARGE = "too_large"
CRASHED = "crashed"
ERRORS = (UNREADABLE, EMPTY, NOT_AN_IMAGE, TRUNCATED, TOO_LARGE, CRASHED)
"""Why a photo has no features: a code, never an exception's text (Pillow's holds addresses)."""

FILES = pa.schema(
    [
        ("path", pa.string()),  # relative to the source, /-separated, exactly as the file is named
        ("size", pa.int64()),  # bytes
        ("modified", pa.timestamp("us", tz="UTC")),  # whole milliseconds: all that Hadoop keeps
    ]
)
"""A listing of a source."""

PHOTOS = pa.schema(
    [
        FILES.field("path"),
        ("split", pa.string()),
        ("label", pa.string()),
        ("filename", pa.string()),
        FILES.field("size"),
        FILES.field("modified"),
    ]
)
"""A listing with each photo's split and label."""

FEATURES_TABLE = pa.schema(
    [
        *PHOTOS,
        ("width", pa.int32()),  # pixels, as the file says, before any rotation
        ("height", pa.int32()),
        ("sha256", pa.string()),  # of the file, hexadecimal; null: not read, or an older table
        ("features", pa.list_(pa.float32())),  # FEATURES numbers, or null
        ("error", pa.string()),  # one of ERRORS, or null
    ]
)
"""``OUT/features``, partitioned by split. A plain list: Spark refuses FixedSizeList."""

PCA_TABLE = pa.schema(
    [
        ("path", pa.string()),
        ("label", pa.string()),
        ("filename", pa.string()),
        ("pca_features", pa.list_(pa.float32())),  # k numbers
    ]
)
"""``OUT/training_pca`` and ``OUT/test_pca``, partitioned by label."""

REJECTED = pa.schema([(name, pa.string()) for name in ("path", "split", "label", "error")])
"""``OUT/rejected.csv``."""

IMAGES = pa.schema(
    [
        ("path", pa.string()),
        ("content", pa.binary()),
        ("label", pa.string()),
        ("filename", pa.string()),
    ]
)
"""The columns of `pomona.load_images`."""

_DDL = {
    pa.string(): "string",
    pa.binary(): "binary",
    pa.bool_(): "boolean",
    pa.int32(): "int",
    pa.int64(): "bigint",
    pa.float32(): "float",
    pa.timestamp("us", tz="UTC"): "timestamp",
    pa.list_(pa.float32()): "array<float>",
    pa.list_(pa.string()): "array<string>",
}


def ddl(schema: pa.Schema) -> str:
    """Return an Arrow schema as Spark's DDL.

    >>> ddl(PCA_TABLE)
    '`path` string, `label` string, `filename` string, `pca_features` array<float>'
    """
    return ", ".join(f"{quoted(field.name)} {_DDL[field.type]}" for field in schema)


def nulls(schema: pa.Schema) -> list[str]:
    """Return Spark SQL expressions that add a schema's columns, all null, to a DataFrame.

    >>> nulls(pa.schema([("error", pa.string())]))
    ['CAST(NULL AS string) AS `error`']
    """
    return [f"CAST(NULL AS {_DDL[field.type]}) AS {quoted(field.name)}" for field in schema]


def quoted(name: str) -> str:
    """Return a column's name quoted for Spark SQL, whatever characters it holds.

    >>> quoted("a.b")
    '`a.b`'
    """
    return "`" + name.replace("`", "``") + "`"


def without(schema: pa.Schema, *names: str) -> pa.Schema:
    """Return the schema less the named columns (a partition's value is in the folder's name)."""
    return pa.schema([field for field in schema if field.name not in names])
