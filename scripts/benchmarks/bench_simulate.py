"""Benchmark `vista simulate`: events per second of generation and of writing.

    python -m scripts.benchmarks.bench_simulate

Generation draws events and impressions with their true probabilities in memory (`generate`); writing produces the
Parquet files (`write`). Impressions do not count as events. There are two shapes: the default (400 users with 4,000
events and 300 impressions each) and four users with a million events. Generation runs on one thread and on all cores,
with the same result. The bar of 10^6 events per second applies to generation and writing together.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from scripts.benchmarks.benchmark import BenchmarkRecorder, interleaved, recording
from vista.config import SimulateConfig
from vista.machine import usable_cores
from vista.simulation.simulate import EVENTS_FILE, IMPRESSIONS_FILE, generate, write
from vista.simulation.streams import SimulatedLog

SHAPES = {
    "400 users of 4,000 events": SimulateConfig(num_users=400, events_per_user=4_000),
    "4 users of 1,000,000 events": SimulateConfig(num_users=4, events_per_user=1_000_000, days=3650.0),
}
QUICK_SHAPES = {"20 users of 1,000 events": SimulateConfig(num_users=20, events_per_user=1_000)}


def check(log: SimulatedLog, config: SimulateConfig, out: Path) -> None:
    """Require that the timed log is complete: its sizes, its order in time, and the files on disk."""
    assert abs(log.num_events - config.num_users * config.events_per_user) <= config.num_users
    rising = np.diff(log.timestamp) > 0
    rising[log.offsets[1:-1] - 1] = True
    assert rising.all() and ((log.probability >= 0) & (log.probability <= 1)).all()
    events = pl.scan_parquet(out / EVENTS_FILE).select(pl.len(), pl.col("item").sum()).collect().row(0)
    assert events == (log.num_events, int((log.item.astype(np.int64) + 1).sum()))
    assert pl.scan_parquet(out / IMPRESSIONS_FILE).select(pl.len()).collect().item() == len(log.impression_item)


def measure(recorder: BenchmarkRecorder, name: str, config: SimulateConfig, folder: Path, rounds: int) -> None:
    """Run all cases of one shape."""
    log = generate(config)
    contestants: dict[str, Callable[[], object]] = {
        f"generation, {threads} thread{'s' * (threads > 1)}": partial(
            generate, dataclasses.replace(config, num_threads=threads)
        )
        for threads in sorted({1, usable_cores()})
    }
    contestants["writing"] = partial(write, log, folder)
    timing = interleaved(contestants, rounds=rounds, warmup=1, max_seconds=40)
    check(log, config, folder)
    for part, each in timing.items():
        recorder.add_rate(f"{name}: {part}", log.num_events, each, "events/s")
    for part, each in timing.items():
        if part != "writing":
            rate = log.num_events / (each.median_s + timing["writing"].median_s)
            recorder.add(f"{name}: {part}, and writing", rate, "events/s", bar="value >= 1e6")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    with recording("simulate", __doc__, arguments) as recorder:
        for name, config in (QUICK_SHAPES if recorder.quick else SHAPES).items():
            measure(recorder, name, config, recorder.folder, rounds=3 if recorder.quick else 7)
    return 0


if __name__ == "__main__":
    sys.exit(main())
