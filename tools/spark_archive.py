"""Archive the classes that Spark loads, so that the tests' JVMs start in half the time.

``python tools/spark_archive.py FILE``. Dynamic class data sharing (JEP 350, Java 13): a JVM writes
what it has loaded when it ends, and later ones map that file instead of loading and verifying its
classes anew. A JVM whose Java or class path is another one ignores the file.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa


def same(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Return what came in: a task as Pomona's are."""
    yield from batches


def main(archive: Path) -> None:
    """Do a little of all that the tests do on Spark, and leave its classes in a file."""
    part = archive.with_name(f"{archive.name}.part")
    os.environ["JDK_JAVA_OPTIONS"] = (
        "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xlog:disable -Xlog:all=error:stderr "
        f"-XX:ArchiveClassesAtExit={part}"
    )
    os.environ["PYSPARK_PYTHON"] = sys.executable
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    builder = builder.config("spark.driver.host", "127.0.0.1").config("spark.log.level", "ERROR")
    spark = builder.getOrCreate()
    with tempfile.TemporaryDirectory() as folder:
        frame = spark.createDataFrame([(1, "a"), (2, "b")], ["id", "text"])
        frame = frame.mapInArrow(same, frame.schema)
        frame.groupBy("text").count().write.parquet(f"{folder}/table")
        spark.read.parquet(f"{folder}/table").toArrow()
        spark.read.format("binaryFile").load(f"{folder}/table").select("path").collect()
    gateway = spark.sparkContext._gateway
    spark.stop()
    gateway.shutdown()
    gateway.proc.stdin.close()
    gateway.proc.wait(120)  # it writes the file now
    part.replace(archive)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
