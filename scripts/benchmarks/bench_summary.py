"""Print the bars that all benchmarks met and missed, from docs/results/bench_*.jsonl."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.benchmarks.benchmark_recorder import RESULTS, read_cases, summary
from vista.errors import VistaError


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the summary; the status is 2 for unreadable files, and with --strict 1 for a missed bar."""
    parser = argparse.ArgumentParser(prog="bench_summary.py", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="default: docs/results/bench_*.jsonl")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if a bar was missed")
    options = parser.parse_args(arguments)
    files: list[Path] = options.files or sorted(RESULTS.glob("bench_*.jsonl"))
    try:
        rows = [row for file in files for row in read_cases(file)]
    except VistaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(rows) if rows else "no benchmark results yet; `make bench` makes them")
    return int(options.strict and any(row["met"] is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
