"""What the store's benchmark works on: records as a refresh writes them, raw LMDB beside them, processes around them.

Processes are spawned, so that none inherits a reader's slot, a thread pool or a warm cache of the parent's.
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
from types import TracebackType
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from scripts.benchmarks.workloads import START_MS
from vista.config.choices import Codec, StateDtype
from vista.device import keep_freed_memory, set_threads
from vista.store import NO_TIMESTAMP, Manifest, RecordSpec, StoreReader, StoreWriter, Tail, encode_records, user_keys
from vista.store.format.state_record import StateArrays, StateSpec, encode_states
from vista.store.layout import environment_path, read_current
from vista.store.lmdb.data_file import MAP_SIZE_BYTES
from vista.store.lmdb.environment import SharedEnvironment
from vista.store.update import StoreUpdate

SUMMARIZER = hashlib.sha256(b"benchmark").digest()
TAIL_LEN = 32
STATE_SHAPE = (2, 4, 16)
"""Layers, heads and head dim of the default model."""
RECORDS_PER_WRITE = 512
"""Users of one durable transaction: what a refresh takes by default."""
RECORDS_PER_READ = 256
LARGEST_UPDATE = 0.02
"""Share of a generation that one batch rewrites: what the bound of the file's size is promised for."""

Batch = tuple[list[bytes], list[bytes]]
"""Keys and values."""
Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shape:
    """K summary tokens of d values, int8."""

    num_tokens: int
    dim: int

    def __str__(self) -> str:
        return f"K={self.num_tokens}, d={self.dim}"

    def writer(self, path: Path, num_users: int, state: StateDtype = StateDtype.none) -> StoreWriter:
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
    """Keys and records of some users: a random summary and a full tail each."""
    count, keys = len(users), user_keys(users)
    shift = (users % 997).astype(np.float32)[:, None, None] / np.float32(997)
    events = np.arange(TAIL_LEN * count)
    tail = Tail(
        (events * 7919 % 50_000 + 1).astype(np.int32),
        START_MS + 60_000 * events,
        (events % 4).astype(np.uint8),
        TAIL_LEN * np.arange(count + 1),
    )
    records = encode_records(
        keys,
        _noise(count, spec.num_tokens, spec.dim) + shift,
        tail,
        spec=spec,
        event_count=users + TAIL_LEN,
        last_event_ts=np.full(count, NO_TIMESTAMP),
        history_digest=users.astype(np.uint64),
    )
    return keys, records


def states_of(keys: Sequence[bytes], spec: StateSpec) -> list[bytes]:
    """A random state of each user."""
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
    path: Path, shape: Shape, num_users: int, *, state: StateDtype = StateDtype.none, batch: int = RECORDS_PER_WRITE
) -> None:
    """A published store of users 1, 2, …"""
    with shape.writer(path, num_users, state) as writer:
        for first in range(writer.cursor, num_users, batch):
            keys, records = records_of(np.arange(first, min(first + batch, num_users)) + 1, writer.spec)
            states = [] if writer.state_spec is None else states_of(keys, writer.state_spec)
            writer.put_batch(keys, records, first + len(keys), states)
        writer.publish()


def user_values(folder: Path) -> dict[bytes, bytes]:
    """All users' values in an LMDB environment that this process has not open, in the order of the keys."""
    with (
        lmdb.open(str(folder), readonly=True, lib_version=0) as environment,
        environment.begin() as transaction,
    ):
        return {key: value for key, value in transaction.cursor() if key.startswith(b"u")}


def served(path: Path) -> Path:
    """Environment of the served generation's records."""
    return environment_path(path, read_current(path))


class RawLmdb:
    """LMDB and nothing else: durable, with the options that the store opens it with."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True)
        self.environment = lmdb.open(str(path), map_size=MAP_SIZE_BYTES, lib_version=0)

    def put(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """One durable transaction."""
        with self.environment.begin(write=True) as transaction:
            for key, value in zip(keys, values, strict=True):
                transaction.put(key, value)

    def copies(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values copied out in one transaction."""
        with self.environment.begin() as transaction:
            return [transaction.get(key) for key in keys]

    def __enter__(self) -> RawLmdb:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.environment.close()


@contextmanager
def process(function: Any, *arguments: Any) -> Iterator[None]:
    """Run a function of this module in a process of its own, which ends with the context: its last argument is set.

    Raises:
        SystemExit: it failed.
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
    """Write what an incremental refresh writes, batch after batch without a pause, while `writing` is set."""
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
    """Hold read transactions open again and again."""
    environment = SharedEnvironment.acquire(served(path))
    ready.set()
    while not done.is_set():
        environment.read(lambda transaction: time.sleep(seconds))
    environment.release()


def report_reader(path: Path, num_users: int, num_reads: int, answer: Any) -> None:
    """Seconds from opening a store to the first record, and bytes that it and the reads after it have added."""
    set_threads(1)
    keep_freed_memory()
    before = private_bytes(Path("/proc/self/smaps").read_text())
    users = np.random.default_rng(2).integers(1, num_users + 1, num_reads)
    start = time.perf_counter()
    with StoreReader.open(path, summarizer_id=SUMMARIZER) as store:
        found = store.get_many(users[:1])
        first_read_s = time.perf_counter() - start
        assert found.found.all() and np.isfinite(found.summary).all()
        for user in users:
            assert store.get_many([int(user)]).found.all()
        after = private_bytes(Path("/proc/self/smaps").read_text())
    answer.put((first_read_s, after - before))


def private_bytes(smaps: str) -> int:
    """Private memory of a process, from its /proc/…/smaps; pages of mapped LMDB files are the page cache's.

    A page of a shared file counts as private as long as one process alone maps it, hence file by file.
    """
    total, counted = 0, False
    for line in smaps.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counted = not line.endswith("/data.mdb")
        elif counted and line.startswith(("Private_Clean:", "Private_Dirty:")):
            total += 1024 * int(line.split()[1])
    return total
