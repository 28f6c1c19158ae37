"""Benchmark the store against LMDB alone: writes, reads, growth, and refreshes.

    python -m scripts.benchmarks.bench_store

Raw LMDB holds the same bytes under the same keys, with the same options and batches, on the same disk and in the same
process; both sides alternate. Cases without such a baseline are compared with a roofline: the bytes copied and the
numbers written, or only the model's functions on the same inputs.

- Writes: durable batches of 512 records, as in a refresh.
- Reads: batches of 256 users from the page cache, checked, and also decoded to float32.
- Latency: reads while another process rewrites the store without a pause.
- Growth: all users rewritten 20 times in batches of 2 % while two processes hold read transactions of 100 ms.
- Refresh: against the work that no implementation can avoid. In an incremental refresh, raw LMDB reads and durably
  writes the states, and the model's functions embed and sum the new events, add the sums to the states and let the
  seeds read the summaries. In a full one without the model, the log's columns are copied, and raw LMDB durably writes
  its records and states, in the same batches.
- Many users: fresh processes open a store of 10^6 users.

Every process uses one thread. The files (about 6 GB) go to --work and are removed.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch

from scripts.benchmarks.benchmark import BenchmarkRecorder, benchmark_parser, interleaved, timing_of
from scripts.benchmarks.store_workloads import (
    LARGEST_UPDATE,
    RECORDS_PER_READ,
    RECORDS_PER_WRITE,
    SUMMARIZER,
    RawLmdb,
    StoreShape,
    hold_transactions,
    process,
    records_of,
    report_reader,
    rewrite,
    served,
    states_of,
    user_values,
    write_store,
)
from scripts.benchmarks.workloads import ACTIONS, START_MS, lifelong_log, untrained
from vista.config import SourceColumns
from vista.config.checks import Precision, StateDtype
from vista.device import keep_freed_memory, set_threads
from vista.log.event_log import EventLog
from vista.log.histories import DAY_MS
from vista.model.history_states import range_states, reach
from vista.model.summarizer import merge_states
from vista.refresh import RefreshReport, refresh, refresh_incremental
from vista.refresh.full import LogItems, from_arrays, read_summaries
from vista.store import StoreReader, user_keys
from vista.store.folder_generation import SharedEnvironment
from vista.store.layout import read_current, state_path
from vista.store.state_record import decode_states
from vista.store.writer import StoreUpdate

SHAPES = (StoreShape(32, 64), StoreShape(128, 256))
"""The shapes of the default model and of the paper's model."""
WARMUP = 2
NUM_REWRITES = 20
HELD_S = 0.1
NUM_NEW = 50
"""New events per user."""
NUM_ITEMS = 50_000
REFRESH_WARMUP = 1


def bench_writes_and_reads(recorder: BenchmarkRecorder, folder: Path, shape: StoreShape) -> None:
    """Time durable writes, then reads, on the same two stores."""
    rounds = 5 if recorder.quick else 31
    num_users = (rounds + WARMUP) * RECORDS_PER_WRITE
    with RawLmdb(folder / "raw") as raw:
        with shape.writer(folder / "ours", num_users) as writer:
            batches = [
                records_of(np.arange(first, first + RECORDS_PER_WRITE) + 1, writer.spec)
                for first in range(0, num_users, RECORDS_PER_WRITE)
            ]
            ours, theirs = iter(batches), iter(batches)

            def write_ours() -> None:
                keys, records = next(ours)
                writer.put_batch(keys, records, writer.cursor + len(keys))

            timing = interleaved(
                {"ours": write_ours, "raw": lambda: raw.put(*next(theirs))},
                rounds=rounds,
                warmup=WARMUP,
                min_sample_s=0,
                max_seconds=math.inf,
            )
            writer.publish()
        case = f"{shape}: durable writes in batches of {RECORDS_PER_WRITE}, against raw LMDB"
        ours_s, raw_s = timing["ours"], timing["raw"]
        recorder.add_rate(case, RECORDS_PER_WRITE, ours_s, "records/s", baseline=raw_s, bar="ratio >= 0.8")
        bench_reads(recorder, folder / "ours", raw, shape, num_users)
    assert user_values(served(folder / "ours")) == user_values(folder / "raw")


def bench_reads(recorder: BenchmarkRecorder, path: Path, raw: RawLmdb, shape: StoreShape, num_users: int) -> None:
    """Time reads from the page cache, of another batch each time."""
    rng = np.random.default_rng(3)
    batches = [rng.choice(num_users, RECORDS_PER_READ, replace=False) + 1 for _ in range(8)]
    keys = [user_keys(users) for users in batches]
    turns = {name: itertools.cycle(range(len(batches))) for name in ("read", "raw", "get_many", "roofline")}
    with StoreReader.open(path, summarizer_id=SUMMARIZER) as store:
        size = len(raw.copies(keys[0])[0] or b"")
        stored = np.ones((len(batches), RECORDS_PER_READ, size), np.uint8)
        payload = np.ones((RECORDS_PER_READ, size), np.uint8)
        numbers = np.ones((RECORDS_PER_READ, shape.num_tokens, shape.dim), np.float32)

        def roofline() -> None:
            np.copyto(payload, stored[next(turns["roofline"])])
            numbers.fill(1)

        timing = interleaved(
            {
                # The part of get_many that reads and checks records, without the conversion to float32.
                "read": lambda: store._current().read(keys[next(turns["read"])]),
                "raw": lambda: raw.copies(keys[next(turns["raw"])]),
                "get_many": lambda: store.get_many(batches[next(turns["get_many"])]),
                "roofline": roofline,
            },
            rounds=9 if recorder.quick else 41,
        )
    case = f"{shape}: reads of {RECORDS_PER_READ} users"
    read, get_many = timing["read"], timing["get_many"]
    copies = f"{case}, checked, against raw LMDB's copies"
    recorder.add_rate(copies, RECORDS_PER_READ, read, "records/s", baseline=timing["raw"], bar="ratio >= 0.7")
    recorder.add_time(
        f"{case}, checked and as float32, against a copy of the bytes and a write of the numbers",
        get_many,
        "ms",
        baseline=timing["roofline"],
        bar="value <= 1.5 * baseline",
    )


def bench_latency(recorder: BenchmarkRecorder, folder: Path, shape: StoreShape) -> None:
    """Time the p99 of reads, in alternation with and without another process that writes."""
    num_users, turns, seconds = (2_000, 2, 0.3) if recorder.quick else (20_000, 5, 3.0)
    write_store(folder / "store", shape, num_users)
    writing = multiprocessing.get_context("spawn").Event()
    rng = np.random.default_rng(4)
    with StoreReader.open(folder / "store") as store, process(rewrite, folder / "store", writing):
        for batch in (1, RECORDS_PER_READ):
            samples: dict[bool, list[float]] = {False: [], True: []}
            batches = itertools.cycle(rng.integers(1, num_users + 1, (256, batch)))
            for busy in [False, True] * turns:
                (writing.set if busy else writing.clear)()
                time.sleep(0.1)
                until = time.perf_counter() + seconds
                while (start := time.perf_counter()) < until:
                    store.get_many(next(batches))
                    samples[busy].append(time.perf_counter() - start)
            idle, busy_ = timing_of(samples[False]), timing_of(samples[True])
            recorder.add(
                f"{shape}: p99 of reads of {batch} user(s) while another process writes, against none",
                busy_.p99_s * 1e3,
                "ms",
                baseline=idle.p99_s * 1e3,
                bar="value <= 2 * baseline",
            )


def bench_growth(recorder: BenchmarkRecorder, folder: Path, shape: StoreShape) -> None:
    """Measure the size of the files after many rewrites of all users, under readers."""
    num_users, path = 2_560 if recorder.quick else 25_600, folder / "store"
    write_store(path, shape, num_users, state=StateDtype.float32)
    files = {"summaries": served(path), "states": state_path(path, read_current(path))}
    before = {name: _file_bytes(file) for name, file in files.items()}
    users, step = np.arange(num_users) + 1, int(LARGEST_UPDATE * num_users)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(process(hold_transactions, path, HELD_S))
        update = stack.enter_context(
            StoreUpdate.open(path, summarizer_id=SUMMARIZER, applied_segment=1, created_at=START_MS)
        )
        assert update.state_spec is not None
        batches = []
        for first in range(0, num_users, step):
            keys, records = records_of(users[first : first + step], update.spec)
            batches.append((keys, records, states_of(keys, update.state_spec)))
        for _ in range(NUM_REWRITES):
            for keys, records, states in batches:
                update.put_batch(keys, records, states)
        update.finish()
    for name, file in files.items():
        with SharedEnvironment.acquire(file) as environment:
            live = environment.live_bytes()
        case = f"{shape}: file of the {name} of {num_users:,} users after {NUM_REWRITES} rewrites"
        recorder.add(
            f"{case}, against its live pages",
            _file_bytes(file) / 2**20,
            "MiB",
            baseline=live / 2**20,
            bar="value <= 1.5 * baseline",
        )
        recorder.add(
            f"{case}, against the new generation", _file_bytes(file) / 2**20, "MiB", baseline=before[name] / 2**20
        )


def bench_many_users(recorder: BenchmarkRecorder, folder: Path, shape: StoreShape) -> None:
    """Open a large store in fresh processes, with its pages out of the page cache and then in it."""
    num_users, num_reads, repeats = (5_000, 500, 1) if recorder.quick else (1_000_000, 10_000, 5)
    path = folder / "store"
    start = time.perf_counter()
    write_store(path, shape, num_users, batch=5_000)
    file = served(path) / "data.mdb"
    print(f"{num_users:,} users written in {time.perf_counter() - start:.0f} s: {file.stat().st_size / 2**30:.2f} GiB")
    answers_of: dict[str, list[tuple[float, int]]] = {"not in the page cache": [], "in the page cache": []}
    for _ in range(repeats):
        _leave_the_page_cache(file)
        for answers in answers_of.values():
            answers.append(_in_fresh_process(path, num_users, num_reads))
    for name, answers in answers_of.items():
        opened = timing_of([seconds for seconds, _ in answers])
        recorder.add_time(f"{shape}: {num_users:,} users {name}: open to first read", opened, "ms", bar="value < 50")
    worst = max(added for answers in answers_of.values() for _, added in answers)
    case = f"{shape}: {num_users:,} users: private memory of a reader after {num_reads:,} reads"
    recorder.add(case, worst / 2**20, "MiB", bar="value < 100")


def _in_fresh_process(path: Path, num_users: int, num_reads: int) -> tuple[float, int]:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    child = context.Process(target=report_reader, args=(path, num_users, num_reads, answer))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"error: the reader ended with status {child.exitcode}; see above")
    first_read_s, added_bytes = answer.get()
    return first_read_s, added_bytes


def _leave_the_page_cache(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _file_bytes(folder: Path) -> int:
    return (folder / "data.mdb").stat().st_size


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
        grown = RefreshWorkload(folder / str(length), length, num_users, num_items, rounds + REFRESH_WARMUP)
        full_s[length] = grown.full_s
        contestants |= {f"{length} refresh": grown.refresh, f"{length} roofline": grown.roofline}
    timing = interleaved(contestants, rounds=rounds, warmup=REFRESH_WARMUP, min_sample_s=0, max_seconds=math.inf)
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
        recorder.add_time(
            f"incremental refresh of {num_users} users: {longest:,} old events each, against {shortest:,}",
            timing[f"{longest} refresh"],
            "ms",
            baseline=timing[f"{shortest} refresh"],
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
        warmup=REFRESH_WARMUP,
        min_sample_s=0,
    )
    seconds = [report.seconds * (1 - report.shares["summarize"]) for report in reports[REFRESH_WARMUP:]]
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
        spent = [report.seconds * report.shares[stage] for report in reports[REFRESH_WARMUP:]]
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = benchmark_parser("store", __doc__)
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="folder for the files; default: the system's temporary folder"
    )
    options = parser.parse_args(arguments)
    set_threads(1)
    keep_freed_memory()
    recorder = BenchmarkRecorder("store", out=options.out, quick=options.quick)
    shape = SHAPES[0]
    parts: list[Callable[[BenchmarkRecorder, Path], None]] = [
        *(partial(bench_writes_and_reads, shape=each) for each in SHAPES),
        *(partial(bench_latency, shape=each) for each in SHAPES),
        partial(bench_growth, shape=shape),
        bench_incremental,
        bench_full,
        partial(bench_many_users, shape=shape),
    ]
    if options.work is not None:
        Path(options.work).mkdir(parents=True, exist_ok=True)
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="vista-bench-", dir=options.work) as folder:
            part(recorder, Path(folder))
    recorder.print_summary()
    return 0


if __name__ == "__main__":
    sys.exit(main())
