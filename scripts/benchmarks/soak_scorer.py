"""Soak test of the scorer: requests under load while its store is refreshed, published, erased from and compacted.

Two worker processes with two threads each score, predict, rank, explain, get user vectors and reload without a pause.
A keeper appends events to the log, refreshes incrementally and in full, erases users, compacts the store and replaces
the model. This process is the judge: it asks every question again of frozen copies of the store. It prints a line per
minute.

    python -m scripts.benchmarks.soak_scorer --minutes 10
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from scripts.benchmarks.benchmark import RESULTS, BenchmarkRecorder
from scripts.benchmarks.soak import (
    THREADS,
    Soak,
    SoakJudge,
    SoakStage,
    ask,
    record,
    record_latencies,
    soak_parser,
    work,
)
from vista.device import set_threads

WORKERS = 2
WARMUP_S = 120.0
"""Memory is judged after this time."""
GROWTH_MIB = 16.0
"""Largest allowed growth of a worker's private memory after the warm-up."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak test; return 1 if anything failed, was wrong or grew."""
    parser = soak_parser(__doc__, RESULTS / "bench_soak.jsonl")
    options = parser.parse_args(arguments)
    set_threads(1)
    seconds = 60 * options.minutes
    minute_s = min(60.0, seconds / 5)
    with tempfile.TemporaryDirectory(prefix="vista-soak-") as folder:
        stage = SoakStage(Path(folder), options.users, num_items=500)
        judge = SoakJudge(stage, partial(ask, num_users=stage.num_users, num_items=stage.num_items))
        workers = [stage.context.Process(target=work, args=(stage, n), daemon=True) for n in range(WORKERS)]
        soak = Soak(stage, judge, workers, WORKERS * THREADS, options.pause, lambda: [p.pid or 0 for p in workers])
        soak.run(seconds, minute_s)
    recorder = BenchmarkRecorder("soak", out=options.out)
    case = f"{options.minutes:g} minutes, {WORKERS} processes x {THREADS} threads"
    record(soak, recorder, case)
    warm = max(1, round(min(WARMUP_S, seconds / 2) / minute_s))
    growth = growth_mib(soak.memory_mib, warm)
    recorder.add(f"{case}: growth of a worker's private memory", growth, "MiB", bar=f"value <= {GROWTH_MIB:g}")
    record_latencies(soak, recorder, case)
    recorder.print_summary()
    return int(any(row["met"] is False for row in recorder.rows))


def growth_mib(memory_mib: Sequence[Sequence[float]], warm_minutes: int) -> float:
    """Largest growth of a running worker's private memory since the warm-up."""
    sizes = np.array(memory_mib)
    return float(np.nanmax(sizes[-1] - sizes[min(warm_minutes, len(sizes)) - 1]))


if __name__ == "__main__":
    sys.exit(main())
