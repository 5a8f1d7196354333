"""What the fuzz targets share: atheris, seeds, limits, and where findings go."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

try:
    import atheris
except ImportError:
    raise SystemExit(
        "fuzzing needs atheris: pip install atheris (Linux; see fuzz/README.md)"
    ) from None


def fuzz(target: Callable[[bytes], None], seeds: Iterable[bytes], rss_mb: int) -> None:
    """Call ``target`` with mutated seeds for a time; a finding ends the process, exit code 77.

    The target raises for what must not happen. libFuzzer itself watches the memory and the time
    of each input.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="how long to fuzz")
    parser.add_argument("--corpus", type=Path, help="inputs to keep and to go on from")
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="where they go")
    parser.add_argument("files", nargs="*", help="inputs to try once, instead of fuzzing")
    given = parser.parse_args()
    given.findings.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(seeds):
            Path(folder, f"seed-{number}").write_bytes(seed)
        corpus = [] if given.corpus is None else [str(given.corpus)]
        if given.corpus is not None:
            given.corpus.mkdir(parents=True, exist_ok=True)
        options = [
            f"-max_total_time={given.seconds}",
            f"-artifact_prefix={given.findings}/",
            f"-rss_limit_mb={rss_mb}",
            "-timeout=60",
            "-max_len=65536",
            "-print_final_stats=1",
        ]
        inputs = given.files or [*corpus, folder]
        atheris.Setup([sys.argv[0], *options, *inputs], target)
        atheris.Fuzz()
