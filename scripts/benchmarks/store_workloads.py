"""Inputs of the store's benchmarks: records as a refresh writes them, and processes that read and write them.

Processes are spawned, so that they do not inherit a reader slot, a thread pool or a warm cache from the parent.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from scripts.benchmarks.workloads import START_MS
from vista.arrays import Int
from vista.config.checks import Codec, StateDtype
from vista.device import keep_freed_memory, set_threads
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
from vista.store.folder_generation import SharedEnvironment
from vista.store.layout import environment_path, read_current
from vista.store.state_record import StateArrays, StateSpec, encode_states
from vista.store.writer import StoreUpdate

SUMMARIZER = hashlib.sha256(b"benchmark").digest()
TAIL_LEN = 32
STATE_SHAPE = (2, 4, 16)
"""Layers, heads and head dim of the default model."""
RECORDS_PER_WRITE = 512
"""Users per durable transaction: the default of a refresh."""
RECORDS_PER_READ = 256
LARGEST_UPDATE = 0.02
"""Share of a generation that one batch rewrites; the bound on the file's size holds up to this share."""
Batch = tuple[list[bytes], list[bytes]]
"""Keys and values."""


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
    arrays = StateArrays(
        rng.standard_normal(shape, dtype=np.float32), weight, 0 * weight, whole, whole, whole, whole.astype(np.uint64)
    )
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


@contextmanager
def process(function: Any, *arguments: Any) -> Iterator[None]:
    """Run a function of this module in its own process until the context ends.

    The function receives two more arguments: the event `ready`, which it sets, and `done`, which asks it to return.

    Raises:
        SystemExit: if the function fails.
    """
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    child = context.Process(target=function, args=(*arguments, ready, done), daemon=True)
    child.start()
    try:
        while not ready.wait(0.1):
            if not child.is_alive():
                raise SystemExit(f"error: {function.__name__} failed in its process; see above")
        yield
    finally:
        done.set()
        child.join(60)
    if child.exitcode:
        raise SystemExit(f"error: {function.__name__} ended with status {child.exitcode}; see above")


def rewrite(path: Path, writing: Event, ready: Event, done: Event) -> None:
    """Write batches as an incremental refresh does, without a pause, while `writing` is set."""
    set_threads(1)
    with StoreUpdate.open(path, summarizer_id=SUMMARIZER, applied_segment=1, created_at=START_MS) as update:
        users = np.arange(update.manifest.count) + 1
        batches = [
            records_of(users[first : first + RECORDS_PER_WRITE], update.spec)
            for first in range(0, len(users), RECORDS_PER_WRITE)
        ]
        ready.set()
        for keys, records in cycle(batches):
            if done.is_set():
                break
            if writing.wait(0.05):
                update.put_batch(keys, records)


def hold_transactions(path: Path, seconds: float, ready: Event, done: Event) -> None:
    """Hold read transactions open, one after the other."""
    environment = SharedEnvironment.acquire(served(path))
    ready.set()
    while not done.is_set():
        environment.read(lambda transaction: time.sleep(seconds))
    environment.release()


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
