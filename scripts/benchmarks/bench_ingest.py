"""Benchmark `vista prepare`: the rows per second of events with ten columns of features, against ids and times only.

    python -m scripts.benchmarks.bench_ingest

Both read the same generated Parquet file, and run in alternation, so that other load on the machine affects both. The
target is in seconds of the processors, those of the parser's process included, which other load affects less.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
import polars as pl

from scripts.benchmarks.benchmark import BenchmarkRecorder, interleaved, recording, timing_of
from vista.config import PrepareConfig, SourceConfig
from vista.log.ingest.prepare import prepare

NUM_EVENTS, QUICK_EVENTS = 2_000_000, 100_000
NUM_VALUES = {"device": 8, "surface": 30, "region": 1000, "domain": 50_000}
CATEGORIES = [*NUM_VALUES, "hour", "is_member"]
NUMBERS = ["dwell", "price", "position", "discount"]


def generated(num: int) -> pl.DataFrame:
    """Events of 50,000 users on 100,000 items; values of categories and items are as skewed as a Zipf law."""
    rng = np.random.default_rng(0)
    columns = {
        "user": rng.integers(0, 50_000, num),
        "item": rng.zipf(1.2, num) % 100_000,
        "timestamp": np.sort(rng.integers(1_600_000_000, 1_700_000_000, num)),
        "hour": rng.integers(0, 24, num),
        "is_member": rng.random(num) < 0.3,
        "dwell": rng.exponential(30, num),
        "price": rng.exponential(9, num).round(2),
        "position": rng.integers(0, 50, num),
        "discount": np.where(rng.random(num) < 0.8, np.nan, rng.random(num)),
    }
    texts = {
        name: pl.Series([f"{name} {value}" for value in range(size)]).gather(rng.zipf(1.3, num) % size)
        for name, size in NUM_VALUES.items()
    }
    return pl.DataFrame(columns | texts)


def cpu_seconds() -> float:
    """Time that the processors have spent on this process and on its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(recorder: BenchmarkRecorder, folder: Path) -> None:
    """Run the cases."""
    num = QUICK_EVENTS if recorder.quick else NUM_EVENTS
    file, numbers = folder / "events.parquet", count()
    spent: dict[str, list[float]] = {"ids": [], "features": []}
    generated(num).write_parquet(file)

    def ingest(name: str, **features: list[str]) -> None:
        before = cpu_seconds()
        events = SourceConfig(paths=[str(file)], timestamp="timestamp", time_unit="s", **features)  # type: ignore[arg-type]
        prepare(PrepareConfig(out=str(folder / f"log-{next(numbers)}"), events=events))
        spent[name].append(cpu_seconds() - before)

    timing = interleaved(
        {
            "ids": lambda: ingest("ids"),
            "features": lambda: ingest("features", categories=CATEGORIES, numbers=NUMBERS),
        },
        rounds=3,
        warmup=1,
    )
    name = f"ingest of {num:,} events with 6 categories and 4 numbers, Parquet, against ids and times only"
    timings = {"events/s": timing, "events per CPU second": {key: timing_of(values) for key, values in spent.items()}}
    for unit, measured in timings.items():
        bar = "value >= 0.5 * baseline" if unit == "events per CPU second" else None
        recorder.add_rate(f"{name}: {unit}", num, measured["features"], unit, baseline=measured["ids"], bar=bar)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    with recording("ingest", __doc__, arguments) as recorder:
        measure(recorder, recorder.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
