"""What spark-submit, Databricks and Kubernetes start: the command, on the session they set up.

``pomona run`` starts a Spark of its own; in a job that Spark itself started there is one already,
with the cluster's settings. Runs on the driver.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pomona.cli import main as command
from pomona.core.errors import WeightsError
from pomona.core.printable import escaped
from pomona.core.uris import redacted
from pomona.spark.session import adopt


def main() -> None:
    """Run ``pomona`` with this process's arguments on the job's own session.

    Weights may be ``s3://…`` or ``gs://…`` here: they are fetched first, since jobs often run where
    the official file can't be reached. The process ends with the command's exit code; a command
    that succeeds returns, because Databricks counts any SystemExit as a failure.
    """
    adopt()
    try:
        with local_weights(sys.argv[1:]) as words:
            sys.argv[1:] = words
            command.main()
    except WeightsError as error:
        print(f"pomona: {escaped(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code:
            raise


@contextlib.contextmanager
def local_weights(words: list[str]) -> Iterator[list[str]]:
    """Give the words with ``--weights URI`` replaced by a local copy, removed afterwards."""
    place = words.index("--weights") + 1 if "--weights" in words else len(words)
    if place >= len(words) or not words[place].startswith(("s3://", "gs://")):
        yield words
        return
    with tempfile.TemporaryDirectory() as folder:
        yield [*words[:place], str(_fetch(words[place], Path(folder))), *words[place + 1 :]]


def _fetch(uri: str, folder: Path) -> Path:
    from pyarrow import fs

    try:
        store, path = fs.FileSystem.from_uri(uri)
        local = folder / str(path).rsplit("/", 1)[-1]
        with store.open_input_stream(path) as stream:
            local.write_bytes(stream.read())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).replace(uri, redacted(uri)).split())[:200]
        raise WeightsError(f"the weights at {redacted(uri)} can't be read: {reason}") from error
    return local


if __name__ == "__main__":
    main()
