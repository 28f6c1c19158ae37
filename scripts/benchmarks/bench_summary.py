"""Print the targets that the benchmarks met and missed, from docs/results/bench_*.jsonl.

python -m scripts.benchmarks.bench_summary
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.benchmarks.benchmark_recorder import RESULTS, read_cases, summary
from vista.errors import VistaError


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the summary; return 2 if a file is unreadable, and with --strict 1 if a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="default: docs/results/bench_*.jsonl")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if a bar was missed")
    options = parser.parse_args(arguments)
    files: list[Path] = options.files or sorted(RESULTS.glob("bench_*.jsonl"))
    try:
        rows = [row for file in files for row in read_cases(file)]
    except VistaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(rows) if rows else "no benchmark results yet; run `make bench`")
    return int(options.strict and any(row["met"] is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
