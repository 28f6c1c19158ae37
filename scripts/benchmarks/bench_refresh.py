"""Benchmark the ingest of logs and the full refresh, with the share of each stage.

    python -m scripts.benchmarks.bench_refresh

Ingest: `prepare` turns generated files into a new EventLog. The files are `ratings.dat` (as in MovieLens-1M),
`ratings.csv` (as in the newer MovieLens sets) and a Parquet table. The time includes the digest of the source, parsing,
validation, vocabularies, sort, write, fsync and rename. The roofline is Polars reading the same columns into memory.
The files were just written, so they are in the page cache.

Refresh: write every user's summary and tail (d=64, K=32, tail of 32, int8) to a new store, durable and published. The
log is ml-1m if available (--data, or VISTA_DATA_DIR), else a generated log of its size. Weights are random.

The rounds of all sources alternate. A result is the median over rounds, and the shares of stages are over all rounds.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from scripts.benchmarks.benchmark import BenchmarkRecorder, benchmark_parser, interleaved, recording
from scripts.benchmarks.workloads import START_MS, find_ml_1m, lifelong_log, popular_items, untrained
from vista.config import PrepareConfig, SourceConfig
from vista.device import keep_freed_memory, set_threads
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.refresh import RefreshReport, refresh

ML_1M = {"users": 6040, "items": 3706, "events": 1_000_209}
NUM_ITEMS = 50_000
EVENTS_PER_USER = 150


def write_sources(folder: Path, num_events: int) -> dict[str, SourceConfig]:
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
    return {
        "ratings.dat": SourceConfig(kind="ml-1m", paths=[str(paths["dat"])]),
        "ratings.csv": SourceConfig(kind="ml-latest-small", paths=[str(paths["csv"])]),
        "Parquet": SourceConfig(
            kind="table",
            paths=[str(paths["parquet"])],
            user="userId",
            item="movieId",
            rating="rating",
            timestamp="timestamp",
            time_unit="s",
        ),
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


def bench_ingest(recorder: BenchmarkRecorder, folder: Path, num_events: int, rounds: int) -> None:
    """Time `prepare` in events per second, for each format."""
    sources = write_sources(folder, num_events)
    number = itertools.count()
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in sources}

    def ingest(name: str) -> None:
        out = folder / f"log-{next(number)}"
        report = prepare(PrepareConfig(out=str(out), events=sources[name]))
        assert report.num_events == num_events and report.num_quarantined == 0
        stages[name].append(report.stages)

    contestants: dict[str, Callable[[], object]] = {name: partial(ingest, name) for name in sources}
    contestants |= {f"{name}, read alone": partial(read_alone, source) for name, source in sources.items()}
    timing = interleaved(contestants, rounds=rounds, warmup=1, max_seconds=90)
    for name in sources:
        each = timing[name]
        case = f"ingest of {num_events:,} events, {name}"
        recorder.add_rate(case, num_events, each, "events/s", bar="value >= 1e6")
        alone = f"{case}: Polars reading the columns alone"
        recorder.add_rate(alone, num_events, timing[f"{name}, read alone"], "events/s")
        add_shares(recorder, case, mean_shares(stages[name][1:]))


def bench_refresh(recorder: BenchmarkRecorder, folder: Path, data: Path | None, rounds: int) -> None:
    """Time a full refresh in users per second."""
    if data is not None and not recorder.quick:
        source = SourceConfig(kind="npz", paths=[str(data)])
        prepare(PrepareConfig(out=str(folder / "ml-1m"), events=source))
        log, name = EventLog.open(folder / "ml-1m"), "ml-1m"
    else:
        users, events = (200, 30_000) if recorder.quick else (ML_1M["users"], ML_1M["events"])
        weight = np.random.default_rng(0).lognormal(0.0, 1.0, users)
        lengths = np.maximum(np.rint(weight / weight.sum() * events), 20).astype(np.int64)
        log, name = lifelong_log(folder / "generated", lengths.tolist(), num_items=ML_1M["items"]), "generated log"
    model = untrained(log, dim=64, num_seeds=32)
    number = itertools.count()
    reports: list[RefreshReport] = []
    once = interleaved(
        {"refresh": lambda: reports.append(refresh(model, log, folder / f"store-{next(number)}"))},
        rounds=rounds,
        warmup=1,
        max_seconds=60,
    )["refresh"]
    assert all(report.num_users == log.num_users and report.num_events == log.num_events for report in reports)
    case = f"refresh of {name}, {log.num_users:,} users, {log.num_events:,} events"
    recorder.add_rate(f"{case}: users", log.num_users, once, "users/s")
    recorder.add_rate(f"{case}: events", log.num_events, once, "events/s")
    add_shares(recorder, case, mean_shares([report.shares for report in reports[1:]]))


def mean_shares(parts: list[dict[str, float]]) -> dict[str, float]:
    """The share of each stage in the sum of all rounds."""
    totals = {stage: sum(part[stage] for part in parts) for stage in parts[0]}
    whole = sum(totals.values())
    return {stage: seconds / whole for stage, seconds in totals.items()}


def add_shares(recorder: BenchmarkRecorder, case: str, shares: dict[str, float]) -> None:
    """Record one row per stage."""
    for stage, share in shares.items():
        recorder.add(f"{case}: share of {stage}", 100 * share, "%")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = benchmark_parser("refresh", __doc__)
    parser.add_argument("--data", type=Path, help="ml-1m's events.npz; default: $VISTA_DATA_DIR/ml-1m/events.npz")
    options = parser.parse_args(arguments)
    data = find_ml_1m(options.data)
    if data is None:
        print("ml-1m not found (set VISTA_DATA_DIR, or give --data): refreshing a generated log of its size instead")
    set_threads(0)
    keep_freed_memory()
    with recording("refresh", __doc__, options) as recorder:
        folder = recorder.folder
        bench_ingest(recorder, folder, 20_000 if options.quick else 2_000_000, rounds=3 if options.quick else 5)
        bench_refresh(recorder, folder, data, rounds=3 if options.quick else 5)
    return 0


if __name__ == "__main__":
    sys.exit(main())
