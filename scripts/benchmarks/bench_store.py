"""Benchmark the store against LMDB alone: writes, reads, growth, and refreshes.

    python -m scripts.benchmarks.bench_store

Raw LMDB holds the same bytes under the same keys, with the same options and batches, on the same disk and in the same
process; both sides alternate. Cases without such a baseline are compared with a roofline: the bytes copied and the
numbers written, or only the model's functions on the same inputs.

- Writes: durable batches of 512 records, as in a refresh.
- Reads: batches of 256 users from the page cache, checked, and also decoded to float32.
- Refresh: against the work that no implementation can avoid. In an incremental refresh, raw LMDB reads and durably
  writes the states, and the model's functions embed and sum the new events, add the sums to the states and let the
  seeds read the summaries. In a full one without the model, the log's columns are copied, and raw LMDB durably writes
  its records and states, in the same batches.
- Many users: fresh processes open a store of 10^6 users.

Every process uses one thread, and is spawned, so that it does not inherit a reader slot, a thread pool or a warm cache.
The files (about 6 GB) go to --work and are removed.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count, cycle
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from numpy.typing import NDArray

from scripts.benchmarks.benchmark import BenchmarkRecorder, benchmark_parser, interleaved, timing_of
from scripts.benchmarks.workloads import ACTIONS, START_MS, lifelong_log, untrained
from vista.arrays import Int
from vista.config import SourceColumns
from vista.config.checks import Codec, Precision, StateDtype
from vista.device import keep_freed_memory, set_threads
from vista.log.event_log import EventLog
from vista.log.histories import DAY_MS
from vista.model.history_states import range_states, reach
from vista.model.summarizer import merge_states
from vista.refresh import RefreshReport, refresh, refresh_incremental
from vista.refresh.full import from_arrays, read_summaries
from vista.refresh.log_reading import LogItems
from vista.store import (
    NO_TIMESTAMP,
    Manifest,
    RecordSpec,
    StoreReader,
    StoreWriter,
    Tail,
    UserSummaries,
    encode_records,
    user_keys,
)
from vista.store.folder_files import MAP_SIZE_BYTES
from vista.store.folder_generation import Batch
from vista.store.layout import environment_path, read_current, state_path
from vista.store.state_record import StateArrays, StateSpec, decode_states, encode_states

SUMMARIZER = hashlib.sha256(b"benchmark").digest()
TAIL_LEN = 32
STATE_SHAPE = (2, 4, 16)
"""Layers, heads and head dim of the default model."""
RECORDS_PER_WRITE = 512
"""Users per durable transaction: the default of a refresh."""
RECORDS_PER_READ = 256
WARMUP = 2
NUM_NEW = 50
"""New events per user."""
NUM_ITEMS = 50_000
REFRESH_WARMUP = 1


@dataclass(frozen=True, slots=True)
class StoreShape:
    """K summary tokens of d int8 values."""

    num_tokens: int
    dim: int

    def __str__(self) -> str:
        return f"K={self.num_tokens}, d={self.dim}"

    def writer(self, path: Path | str, num_users: int, state: StateDtype = StateDtype.none) -> StoreWriter:
        """A new generation for users 1, 2, …"""
        manifest = Manifest(
            created_at=START_MS,
            summarizer_id=SUMMARIZER.hex(),
            num_tokens=self.num_tokens,
            dim=self.dim,
            codec=Codec.int8.value,
            tail_len=TAIL_LEN,
            applied_segment=0,
            total_users=num_users,
            run_digest="benchmark",
            state_dtype=state.value,
            state_shape=(0, 0, 0) if state is StateDtype.none else STATE_SHAPE,
        )
        return StoreWriter.open(path, manifest)


SHAPES = (StoreShape(32, 64), StoreShape(128, 256))
"""The shapes of the default model and of the paper's model."""


@lru_cache(maxsize=2)
def _noise(num_users: int, num_tokens: int, dim: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((num_users, num_tokens, dim), dtype=np.float32)


def records_of(users: Int, spec: RecordSpec) -> Batch:
    """Keys and records of some users, each with a random summary and a full tail."""
    count, keys = len(users), user_keys(users)
    shift = (users % 997).astype(np.float32)[:, None, None] / np.float32(997)
    events = np.arange(TAIL_LEN * count)
    tail = Tail(
        (events * 7919 % 50_000 + 1).astype(np.int32),
        START_MS + 60_000 * events,
        (events % 4).astype(np.uint8),
        TAIL_LEN * np.arange(count + 1),
    )
    summaries = UserSummaries(
        keys=keys,
        summary=_noise(count, spec.num_tokens, spec.dim) + shift,
        tail=tail,
        event_count=users + TAIL_LEN,
        last_event_ts=np.full(count, NO_TIMESTAMP),
        history_digest=users.astype(np.uint64),
    )
    return keys, encode_records(summaries, spec)


def states_of(keys: Sequence[bytes], spec: StateSpec) -> list[bytes]:
    """A random state per user."""
    count, heads = len(keys), spec.num_heads
    shape = (count, spec.num_layers, heads, spec.head_dim, spec.head_dim)
    rng = np.random.default_rng(1)
    weight = np.full((count, heads), 100, np.float32)
    whole = np.full(count, 100)
    z, digest = rng.standard_normal(shape, dtype=np.float32), whole.astype(np.uint64)
    arrays = StateArrays(z, weight, 0 * weight, whole, whole, whole, digest, np.zeros((count, 0)))
    return encode_states(keys, arrays, spec)


def write_store(
    path: Path,
    shape: StoreShape,
    num_users: int,
    *,
    state: StateDtype = StateDtype.none,
    batch: int = RECORDS_PER_WRITE,
) -> None:
    """Write and publish a store of users 1, 2, …"""
    with shape.writer(path, num_users, state) as writer:
        for first in range(writer.cursor, num_users, batch):
            keys, records = records_of(np.arange(first, min(first + batch, num_users)) + 1, writer.spec)
            states = [] if writer.state_spec is None else states_of(keys, writer.state_spec)
            writer.put_batch(keys, records, first + len(keys), states)
        writer.publish()


def user_values(folder: Path) -> dict[bytes, bytes]:
    """All users' values in an LMDB environment, by key; this process must not have it open."""
    with (
        lmdb.open(str(folder), readonly=True, lib_version=0) as environment,
        environment.begin() as transaction,
    ):
        return {key: value for key, value in transaction.cursor() if key.startswith(b"u")}


def served(path: Path) -> Path:
    """LMDB environment of the current generation's records."""
    return environment_path(path, read_current(path))


def report_reader(path: Path, num_users: int, num_reads: int, answer: Any) -> None:
    """Answer with the seconds from opening a store to its first record, and the private memory that all reads add."""
    set_threads(1)
    keep_freed_memory()
    before = private_bytes(Path("/proc/self/smaps").read_text())
    users = np.random.default_rng(2).integers(1, num_users + 1, num_reads)
    start = time.perf_counter()
    with StoreReader.open(path, summarizer_id=SUMMARIZER) as store:
        first = store.get_many(users[:1])
        first_read_s = time.perf_counter() - start
        assert first.found.all() and np.isfinite(first.summary).all()
        for user in users:
            assert store.get_many([int(user)]).found.all()
        after = private_bytes(Path("/proc/self/smaps").read_text())
    answer.put((first_read_s, after - before))


def private_bytes(smaps: str) -> int:
    """Private memory of a process, from its /proc/…/smaps, without the mapped pages of LMDB files.

    The kernel counts a file's page as private while only one process maps it, although it belongs to the page cache.
    """
    total, counted = 0, False
    for line in smaps.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counted = not line.endswith("/data.mdb")
        elif counted and line.startswith(("Private_Clean:", "Private_Dirty:")):
            total += 1024 * int(line.split()[1])
    return total


class RawLmdb:
    """A durable LMDB environment with the same options as the store's."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True)
        self.environment = lmdb.open(str(path), map_size=MAP_SIZE_BYTES, lib_version=0)

    def put(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Write all values in one durable transaction."""
        with self.environment.begin(write=True) as transaction:
            for key, value in zip(keys, values, strict=True):
                transaction.put(key, value)

    def copies(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Copies of the values, read in one transaction."""
        with self.environment.begin() as transaction:
            return [transaction.get(key) for key in keys]

    def __enter__(self) -> RawLmdb:
        return self

    def __exit__(self, *_: object) -> None:
        self.environment.close()


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
    turns = {name: cycle(range(len(batches))) for name in ("read", "raw", "get_many", "roofline")}
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


def bench_incremental(recorder: BenchmarkRecorder, folder: Path) -> None:
    """Incremental refreshes: few users with histories of several lengths, many users, and users without new events."""
    if recorder.quick:
        compare_lengths(recorder, folder / "few", 16, {1_000: None, 10_000: None}, rounds=5)
        compare_lengths(recorder, folder / "many", 64, {1_000: None}, rounds=3)
    else:
        bars = {10_000: "ratio >= 20", 100_000: None, 1_000_000: "ratio >= 1000"}
        compare_lengths(recorder, folder / "few", 64, bars, rounds=15)
        compare_lengths(recorder, folder / "many", 1_000, {10_000: "ratio >= 20"}, rounds=9)


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
    number = count()

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
    recorder.add_rate(f"{case}: users", num_users, timing["refresh"], "users/s")
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
