"""Benchmark `vista prepare`: the rate of events by format, and with ten columns of features.

    python -m scripts.benchmarks.bench_ingest

Formats: `ratings.dat` (as in MovieLens-1M), `ratings.csv` (as in the newer MovieLens sets) and a Parquet table of the
same events become a new EventLog. The time includes the digest of the source, parsing, validation, vocabularies, sort,
write, fsync and rename. The roofline is Polars reading the same columns into memory. The files were just written, so
they are in the page cache. The shares of stages are over all rounds.

Features: a Parquet file with six categories and four numbers against ids and times only. The target is in seconds of
the processors, those of the parser's process included, which other load on the machine affects less.

All contestants run in alternation.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import polars as pl

from scripts.benchmarks.benchmark import BenchmarkRecorder, interleaved, recording, timing_of
from scripts.benchmarks.workloads import START_MS, popular_items
from vista.config import PrepareConfig, SourceConfig
from vista.device import keep_freed_memory
from vista.log.ingest.prepare import prepare

NUM_EVENTS, QUICK_EVENTS = 2_000_000, 20_000
NUM_ITEMS, EVENTS_PER_USER = 50_000, 150
NUM_VALUES = {"device": 8, "surface": 30, "region": 1000, "domain": 50_000}
CATEGORIES = [*NUM_VALUES, "hour", "is_member"]
NUMBERS = ["dwell", "price", "position", "discount"]


def write_formats(folder: Path, num_events: int) -> dict[str, SourceConfig]:
    """Write the same events, in random order, in three formats."""
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "userId": rng.integers(1, num_events // EVENTS_PER_USER + 2, num_events),
            "movieId": popular_items(rng, num_events, NUM_ITEMS) + 1,
            "rating": rng.integers(1, 6, num_events),
            "timestamp": START_MS // 1000 + rng.integers(0, 10**8, num_events),
        }
    )
    paths = {kind: folder / f"ratings.{kind}" for kind in ("dat", "csv", "parquet")}
    frame.select(pl.concat_str(frame.columns, separator="::")).write_csv(
        paths["dat"], include_header=False, quote_style="never"
    )
    frame.write_csv(paths["csv"])
    frame.write_parquet(paths["parquet"])
    columns = {"user": "userId", "item": "movieId", "rating": "rating", "timestamp": "timestamp", "time_unit": "s"}
    return {
        "ratings.dat": SourceConfig(kind="ml-1m", paths=[str(paths["dat"])]),
        "ratings.csv": SourceConfig(kind="ml-latest-small", paths=[str(paths["csv"])]),
        "Parquet": SourceConfig(kind="table", paths=[str(paths["parquet"])], **columns),  # type: ignore[arg-type]
    }


def read_alone(source: SourceConfig) -> int:
    """The roofline: only read the columns of a source into memory."""
    path = Path(source.paths[0])
    if path.suffix == ".parquet":
        return pl.read_parquet(path).height
    # Polars splits at single bytes: "::" gives empty columns in between, which are skipped.
    if path.suffix == ".dat":
        return pl.read_csv(path, separator=":", has_header=False, columns=[0, 2, 4, 6]).height
    return pl.read_csv(path).height


def bench_formats(recorder: BenchmarkRecorder, folder: Path, num_events: int) -> None:
    """Time `prepare` in events per second, for each format."""
    sources, number = write_formats(folder, num_events), count()
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in sources}

    def ingest(name: str) -> None:
        out = folder / f"log-{next(number)}"
        report = prepare(PrepareConfig(out=str(out), events=sources[name]))
        assert report.num_events == num_events and report.num_quarantined == 0
        stages[name].append(report.stages)

    contestants: dict[str, Callable[[], object]] = {name: partial(ingest, name) for name in sources}
    contestants |= {f"{name}, read alone": partial(read_alone, source) for name, source in sources.items()}
    timing = interleaved(contestants, rounds=3 if recorder.quick else 5, warmup=1, max_seconds=90)
    for name in sources:
        case = f"ingest of {num_events:,} events, {name}"
        recorder.add_rate(case, num_events, timing[name], "events/s", bar="value >= 1e6")
        alone = f"{case}: Polars reading the columns alone"
        recorder.add_rate(alone, num_events, timing[f"{name}, read alone"], "events/s")
        own = stages[name][1:]  # without the warm-up
        total = sum(sum(part.values()) for part in own)
        for stage in own[0]:
            recorder.add(f"{case}: share of {stage}", 100 * sum(part[stage] for part in own) / total, "%")


def featured_events(num: int) -> pl.DataFrame:
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


def bench_features(recorder: BenchmarkRecorder, folder: Path, num: int) -> None:
    """Time `prepare` with and without columns of features."""
    file, numbers = folder / "events.parquet", count()
    spent: dict[str, list[float]] = {"ids": [], "features": []}
    featured_events(num).write_parquet(file)

    def ingest(name: str, **features: list[str]) -> None:
        before = cpu_seconds()
        events = SourceConfig(paths=[str(file)], timestamp="timestamp", time_unit="s", **features)  # type: ignore[arg-type]
        prepare(PrepareConfig(out=str(folder / f"featured-{next(numbers)}"), events=events))
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
    keep_freed_memory()
    with recording("ingest", __doc__, arguments) as recorder:
        num_events = QUICK_EVENTS if recorder.quick else NUM_EVENTS
        bench_formats(recorder, recorder.folder, num_events)
        bench_features(recorder, recorder.folder, num_events)
    return 0


if __name__ == "__main__":
    sys.exit(main())
