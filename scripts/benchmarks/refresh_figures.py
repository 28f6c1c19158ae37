"""Refreshes against their rooflines, for bench_store.py.

The roofline of an incremental refresh is the work that no implementation can avoid: raw LMDB reads and durably writes
the users' states, and the model's functions embed and sum the new events, add the sums to the states and let the seeds
read the summaries. A full refresh's time without the model is compared with a copy of the log's columns and a durable
write of its records and states by raw LMDB, in the same batches.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from scripts.benchmarks.benchmark_recorder import BenchmarkRecorder
from scripts.benchmarks.raw_lmdb import RawLmdb
from scripts.benchmarks.store_workloads import RECORDS_PER_WRITE, served, user_values
from scripts.benchmarks.timing import interleaved
from scripts.benchmarks.workloads import ACTIONS, lifelong_log, untrained
from vista.config import SourceColumns
from vista.config.choices import Precision
from vista.log.event_log import EventLog
from vista.log.histories import DAY_MS
from vista.model.history_states import range_states, reach
from vista.model.summarizer import merge_states
from vista.refresh import RefreshReport, refresh, refresh_incremental
from vista.refresh.batch_encoder import LogItems, from_arrays, read_summaries
from vista.store import StoreReader, user_keys
from vista.store.layout import read_current, state_path
from vista.store.state_record import decode_states

NUM_NEW = 50
"""New events per user."""
NUM_ITEMS = 50_000
WARMUP = 1


def bench_incremental(recorder: BenchmarkRecorder, folder: Path) -> None:
    """Incremental refreshes: few users with histories of several lengths, many users, and users without new events."""
    if recorder.quick:
        compare_lengths(recorder, folder / "few", 16, {1_000: None, 10_000: None}, rounds=5)
        compare_lengths(recorder, folder / "many", 64, {1_000: None}, rounds=3)
    else:
        bars = {10_000: "ratio >= 20", 100_000: None, 1_000_000: "ratio >= 1000"}
        compare_lengths(recorder, folder / "few", 64, bars, rounds=15)
        compare_lengths(recorder, folder / "many", 1_000, {10_000: "ratio >= 20"}, rounds=9)
    compare_records(recorder, folder / "unchanged")


def compare_lengths(
    recorder: BenchmarkRecorder, folder: Path, num_users: int, bars: dict[int, str | None], rounds: int
) -> None:
    """Compare incremental refreshes with their rooflines and with full refreshes, by the number of old events.

    Args:
        bars: number of old events -> bar for the full refresh's time over the incremental one's.
    """
    contestants: dict[str, Callable[[], object]] = {}
    full_s: dict[int, float] = {}
    num_items = min(NUM_ITEMS, num_users * min(bars))  # equal for all lengths, since a refresh hashes all items
    for length in bars:
        grown = RefreshWorkload(folder / str(length), length, num_users, num_items, rounds + WARMUP)
        full_s[length] = grown.full_s
        contestants |= {f"{length} refresh": grown.refresh, f"{length} roofline": grown.roofline}
    timing = interleaved(contestants, rounds=rounds, warmup=WARMUP, min_sample_s=0, max_seconds=math.inf)
    for length, bar in bars.items():
        mine, roofline = timing[f"{length} refresh"], timing[f"{length} roofline"]
        case = f"incremental refresh of {num_users} users of {length:,} events, {NUM_NEW} new each"
        seconds, spread = mine.median_s, mine.spread_s * 1e3
        recorder.add(
            f"{case}, over the roofline",
            seconds * 1e3,
            "ms",
            baseline=roofline.median_s * 1e3,
            bar="value <= 2 * baseline",
            spread=spread,
        )
        recorder.add(f"{case}, against a full refresh", seconds * 1e3, "ms", baseline=full_s[length] * 1e3, bar=bar)
    shortest, longest = min(bars), max(bars)
    if shortest < longest:
        recorder.add(
            f"incremental refresh of {num_users} users: {longest:,} old events each, against {shortest:,}",
            timing[f"{longest} refresh"].median_s * 1e3,
            "ms",
            baseline=timing[f"{shortest} refresh"].median_s * 1e3,
            bar="value <= 1.1 * baseline",
        )


def compare_records(recorder: BenchmarkRecorder, folder: Path) -> None:
    """Require that an incremental refresh changes no byte of the records of users without new events."""
    log = lifelong_log(folder / "log", [200] * 100, num_items=1_000)
    model = untrained(log, dim=64, num_seeds=32)
    refresh(model, log, folder / "store")
    before, changed = user_values(served(folder / "store")), np.arange(1, 101, 3)
    report = refresh_incremental(model, append_events(log, changed), folder / "store")
    after, keys = user_values(served(folder / "store")), set(user_keys(changed))
    assert report.num_users == len(changed) and all(before[key] != after[key] for key in keys)
    others = sum(before[key] != after[key] for key in before.keys() - keys) + len(before.keys() ^ after.keys())
    recorder.add("records of users without new events that changed", others, "records", bar="value <= 0")


class RefreshWorkload:
    """A log with new events, stores without them, and the roofline of updating one store."""

    def __init__(self, folder: Path, length: int, num_users: int, num_items: int, num_stores: int) -> None:
        log = lifelong_log(folder / "log", [length] * num_users, num_items=num_items)
        self.model = untrained(log, dim=64, num_seeds=32)
        self.frozen = self.model.with_frozen("summarizer", Precision.float32)
        full = refresh(self.model, log, folder / "store")
        self.full_s = full.seconds
        self.log = append_events(log, np.arange(num_users) + 1)
        self.folder, self.num_users = folder, num_users
        for number in range(num_stores):
            shutil.copytree(folder / "store", folder / f"store-{number}")
        self._stores = (folder / f"store-{number}" for number in range(num_stores))
        self._prepare_roofline()

    def refresh(self) -> None:
        """Refresh the next store incrementally."""
        report = refresh_incremental(self.model, self.log, next(self._stores))
        assert report.counts["appended"] == self.num_users and report.num_events == NUM_NEW * self.num_users

    def roofline(self) -> None:
        """Move the bytes and run the model of the same refresh."""
        self.raw.copies(self.keys)
        summarizer = self.model.summarizer
        assert summarizer is not None
        with torch.inference_mode():
            state = merge_states(self.state, range_states(self.frozen, self.rows, self.context), summarizer.decay_rate)
            read_summaries(self.frozen, state)
        self.raw.put(self.keys, self.states)

    def _prepare_roofline(self) -> None:
        users, reached = np.arange(self.num_users), reach(self.model)
        self.keys = user_keys(self.log.users.ids(users))
        with StoreReader.open(self.folder / "store") as store:
            spec = store.manifest.state_spec()
        assert spec is not None
        stored = user_values(state_path(self.folder / "store", spec.generation))
        self.states = [stored[key] for key in self.keys]
        self.raw = RawLmdb(self.folder / "raw")
        self.raw.put(self.keys, self.states)
        self.state = from_arrays(decode_states(self.states, self.keys, spec), self.model.device)
        new = self.log.gather_ranges(users, self.log.lengths - NUM_NEW - reached, self.log.lengths)
        self.rows = LogItems.of(self.model, self.log).model_rows(new)
        self.context = np.full(self.num_users, reached)


def bench_full(recorder: BenchmarkRecorder, folder: Path) -> None:
    """Compare a full refresh without its model with the bytes that it reads and writes."""
    num_users, num_events, rounds = (200, 30_000, 3) if recorder.quick else (6_040, 1_000_209, 7)
    weight = np.random.default_rng(0).lognormal(0.0, 1.0, num_users)
    lengths = np.maximum(np.rint(weight / weight.sum() * num_events), 20).astype(np.int64)
    log = lifelong_log(folder / "log", lengths.tolist(), num_items=3_706)
    model = untrained(log, dim=64, num_seeds=32)
    refresh(model, log, folder / "store")
    records = user_values(served(folder / "store"))
    states = user_values(state_path(folder / "store", read_current(folder / "store")))
    assert list(records) == list(states)
    keys = [list(records)[first : first + RECORDS_PER_WRITE] for first in range(0, len(records), RECORDS_PER_WRITE)]
    batches = [(some, [records[key] for key in some], [states[key] for key in some]) for some in keys]
    reports: list[RefreshReport] = []
    number = itertools.count()

    def roofline() -> None:
        for segment in log.segments:
            for column in segment.events.columns.values():
                np.array(column)
        with RawLmdb(folder / f"raw-{next(number)}") as summary, RawLmdb(folder / f"raw-{next(number)}") as state:
            for some, own_records, own_states in batches:
                state.put(some, own_states)
                summary.put(some, own_records)

    timing = interleaved(
        {
            "refresh": lambda: reports.append(refresh(model, log, folder / f"store-{next(number)}")),
            "roofline": roofline,
        },
        rounds=rounds,
        warmup=WARMUP,
        min_sample_s=0,
    )
    seconds = [report.seconds * (1 - report.shares["summarize"]) for report in reports[WARMUP:]]
    case = f"full refresh of {num_users:,} users, {log.num_events:,} events"
    recorder.add(
        f"{case}: all but the model, against the log's bytes copied and the same records written by raw LMDB",
        float(np.median(seconds)),
        "s",
        baseline=timing["roofline"].median_s,
        bar="value <= 1.5 * baseline",
        spread=float(np.subtract(*np.percentile(seconds, [75, 25]))),
    )
    for stage in reports[0].shares:
        spent = [report.seconds * report.shares[stage] for report in reports[WARMUP:]]
        recorder.add(f"{case}: {stage}", float(np.median(spent)), "s")


def append_events(log: EventLog, users: np.ndarray) -> EventLog:
    """Append new events of these user ids to the log, a day after all others."""
    rng, count = np.random.default_rng(5), NUM_NEW * len(users)
    span = log.time_range()
    assert span is not None
    frame = {
        "user": np.repeat(users, NUM_NEW),
        "item": rng.integers(1, log.num_items + 1, count),
        "timestamp": span[1] + DAY_MS + np.arange(count),
        "action": np.array(ACTIONS)[rng.integers(0, len(ACTIONS), count)],
    }
    return EventLog.from_frame(frame, log.path, time_unit="ms", columns=SourceColumns(action="action"), append=True)
