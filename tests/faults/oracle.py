"""The oracle: the run determines every byte of a store, and what may be read from it after a fault.

Functions that take `say` are jobs of a nursery. An AssertionError of the others means that a promise is broken.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.nursery import Say
from tests.record_reference import decode_record_reference
from vista.counters.counters import CounterCodes, CounterSpec
from vista.errors import StoreError
from vista.store import StoreReader, StoreWriter, Tail, UserSummaries, encode_records, user_keys
from vista.store.folder_files import open_environment
from vista.store.keys import CURSOR_KEY, MANIFEST_KEY
from vista.store.layout import environment_path
from vista.store.manifest import Manifest
from vista.store.reader import StoredBatch
from vista.store.record import CounterLayout, RecordSpec, TailColumn

SUMMARIZER = bytes(range(32))
COUNTERS = CounterLayout.of(CounterSpec(keys=(4,)), [60_000])
TAIL_COLUMNS = (TailColumn("surface", 300), TailColumn("dwell", None))
CREATED_AT = 1_700_000_000_000
Contents = dict[bytes, Any]
"""Everything in a store: key -> bytes, or on a server also a set, or the members of a sorted set in order."""


@dataclass(frozen=True)
class Run:
    """What a writer writes: users 0 … total − 1, whose values depend only on user and salt."""

    salt: int = 0
    total: int = 48
    batch: int = 8
    num_tokens: int = 2
    dim: int = 16
    codec: str = "int8"

    @property
    def words(self) -> dict[str, Any]:
        """The run as an argument of a job."""
        return dataclasses.asdict(self)

    def open_writer(self, store: str | Path, **options: Any) -> StoreWriter:
        """Open or resume the run's writer, with other fields of the manifest."""
        manifest = Manifest(
            summarizer_id=SUMMARIZER.hex(),
            num_tokens=self.num_tokens,
            dim=self.dim,
            codec=self.codec,
            tail_len=4,
            applied_segment=0,
            total_users=self.total,
            run_digest=f"log of salt {self.salt}",
            counters=COUNTERS.to_dict(),
            tail_columns=[dataclasses.asdict(column) for column in TAIL_COLUMNS],
            created_at=CREATED_AT + self.salt,
            **options,
        )
        return StoreWriter.open(store, manifest)

    def summary(self, users: range) -> np.ndarray:
        """[B, K, d] float32."""
        place = np.arange(self.num_tokens * self.dim, dtype=np.float64).reshape(self.num_tokens, self.dim)
        values = np.sin(place * 0.7 + np.array(users, np.float64)[:, None, None] * 1.3 + 100.0 * self.salt)
        return values.astype(np.float32)

    def tail(self, users: range) -> Tail:
        """Tails: user u has (u + salt) % 5 events, at most 4."""
        lengths = np.minimum((np.array(users) + self.salt) % 5, 4)
        owner = np.repeat(np.array(users), lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        event = 4 * owner + np.arange(len(owner)) - np.repeat(offsets[:-1], lengths)
        features = {
            "surface": ((7 * event + self.salt) % 301 - 1).astype(np.int32),
            "dwell": np.where(event % 3, np.sin(event), np.nan).astype(np.float32),
        }
        times = owner.astype(np.int64) * 1000 + self.salt
        return Tail(owner.astype(np.int32), times, owner.astype(np.uint8), offsets, features)

    def counters(self, users: range) -> CounterCodes:
        """Counters: user u has (u + salt) % 5 keys, at most 4."""
        lengths = np.minimum((np.array(users) + self.salt) % 5, 4)
        owner, offsets = np.repeat(np.array(users), lengths), np.concatenate([[0], np.cumsum(lengths)])
        key = 1 + 7 * np.arange(len(owner)) - 7 * np.repeat(offsets[:-1], lengths) + owner
        codes = (key[:, None] * np.arange(1, COUNTERS.spec.num_columns + 1) + self.salt) % 64
        clock = np.array(users, np.int64) + self.salt + 5
        return CounterCodes(COUNTERS.spec, key.astype(np.int32), codes.astype(np.uint8), offsets, clock)

    def records(self, users: range, spec: RecordSpec) -> tuple[list[bytes], list[bytes]]:
        """Keys and records of these users."""
        keys = user_keys(list(users))
        counts = np.array(users, np.int64) + self.salt
        summaries = UserSummaries(
            keys=keys,
            summary=self.summary(users),
            tail=self.tail(users),
            event_count=counts,
            last_event_ts=counts + 5,
            history_digest=counts.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15),
            counters=(self.counters(users),),
        )
        return keys, encode_records(summaries, spec)

    def batches(self, begin: int) -> Iterator[range]:
        """Batches of users from `begin`."""
        for first in range(begin, self.total, self.batch):
            yield range(first, min(first + self.batch, self.total))


def write(say: Say, store: str, words: dict[str, Any]) -> int:
    """Write or resume a run and publish it. Says ["begin", n] before and ["ack", n] after a batch that ends at user n.

    Returns:
        The generation.
    """
    run = Run(**words)
    with run.open_writer(store) as writer:
        say(["open", writer.cursor])
        for users in run.batches(writer.cursor):
            say(["begin", users.stop])
            writer.put_batch(*run.records(users, writer.spec), users.stop)
            say(["ack", users.stop])
        say(["publish", run.total])
        writer.publish()
        say(["published", writer.generation])
        return writer.generation


def acknowledged(messages: list[Any]) -> int:
    """Users that a writer acknowledged, from its messages; -1 if it did not open."""
    return max((number for what, number in messages if what in ("open", "ack")), default=-1)


def unpublished(say: Say, store: str, words: dict[str, Any], generation: int, least: int) -> int:
    """Check an unfinished generation: exact bytes of whole batches from the first, including all acknowledged ones.

    Returns:
        Its cursor.
    """
    run = Run(**words)
    folder = environment_path(Path(store), generation)
    environment = open_environment(folder, readonly=True)
    with environment.begin() as transaction:
        stored = dict(transaction.cursor())
    environment.close()
    manifest = Manifest.from_bytes(stored.pop(MANIFEST_KEY), folder)
    cursor = int(stored.pop(CURSOR_KEY))
    stored.pop(b"!complete", None)
    assert cursor >= least, f"{least} users were acknowledged, the cursor is {cursor}"
    assert cursor == run.total or cursor % run.batch == 0, f"half a batch: {cursor}"
    keys, records = run.records(range(cursor), manifest.spec()) if cursor else ([], [])
    assert stored == dict(zip(keys, records, strict=True)), "the records differ from those that were written"
    return cursor


def published(say: Say, store: str, words: dict[str, Any], generation: int | None = None) -> int:
    """Check that CURRENT's generation equals the whole run; returns its number."""
    run = Run(**words)
    with StoreReader.open(store, summarizer_id=SUMMARIZER) as opened:
        assert generation is None or opened.generation == generation, (opened.generation, generation)
        assert list(opened.keys()) == list(range(run.total))
        batch = opened.get_many(range(-1, run.total + 1))
        assert batch.found.tolist() == [False, *[True] * run.total, False]
        assert differences(batch, run, range(-1, run.total + 1), opened.manifest.spec()) == []
        return opened.generation


def differences(batch: StoredBatch, run: Run, users: range, spec: RecordSpec) -> list[int]:
    """Users whose result differs in a bit from what was written, or from a miss."""
    expected = expected_fields(run, spec)
    wrong = []
    for row, user in enumerate(users):
        if not batch.found[row]:
            if batch.summary[row].any() or batch.event_count[row] or batch.history_digest[row]:
                wrong.append(user)  # A miss must be empty.
        elif not 0 <= user < run.total or fields(batch, row) != expected[user]:
            wrong.append(user)
    return wrong


def fields(batch: StoredBatch, row: int) -> tuple[Any, ...]:
    """All fields of one user in a batch, as bytes and integers."""
    tail = slice(batch.tail.offsets[row], batch.tail.offsets[row + 1])
    (counters,) = batch.counters
    keys = slice(counters.offsets[row], counters.offsets[row + 1])
    return (
        batch.summary[row].tobytes(),
        batch.tail.items[tail].tobytes(),
        batch.tail.times[tail].tobytes(),
        batch.tail.actions[tail].tobytes(),
        batch.tail.features["surface"][tail].tobytes(),
        batch.tail.features["dwell"][tail].tobytes(),
        int(batch.event_count[row]),
        int(batch.last_event_ts[row]),
        int(batch.created_at[row]),
        int(batch.history_digest[row]),
        counters.key[keys].tolist(),
        counters.codes[keys].tolist(),
        int(counters.clock[row]),
    )


@cache
def expected_fields(run: Run, spec: RecordSpec) -> list[tuple[Any, ...]]:
    """The `fields` of all users of a run, by the reference decoder of the format."""
    expected = []
    for record in run.records(range(run.total), spec)[1]:
        one = decode_record_reference(record, COUNTERS, {"surface": "<u2", "dwell": "<f4"})
        (counted,) = one["counters"]
        columns = (one[name].tobytes() for name in ("summary", "items", "times", "actions"))
        features = (one["surface"].astype(np.int32) - 1).tobytes(), one["dwell"].tobytes()
        numbers = (int(one[name]) for name in ("event_count", "last_event_ts", "created_at", "history_digest"))
        counters = list(counted), [np.asarray(codes).tolist() for codes in counted.values()]
        expected.append((*columns, *features, *numbers, *counters, int(one["last_event_ts"])))
    return expected


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise AssertionError if the block takes longer."""
    began = time.monotonic()
    yield
    taken = time.monotonic() - began
    assert taken <= seconds, f"took {taken:.2f} s instead of {seconds:g} s at most"


def is_unpublished(store: str | Path) -> bool:
    """Whether nothing is published and a reader gets an error that says so."""
    try:
        StoreReader.open(store).close()
    except StoreError as error:
        assert "no published generation" in str(error), error
        return True
    return False


def read_everything(store: str | Path) -> int:
    """Read all records of a store with unknown content; returns their number."""
    with StoreReader.open(store) as opened:
        users = np.array(list(opened.keys()))
        return int(opened.get_many(users).found.sum())


def put_value(store: str, key: bytes, value: bytes) -> None:
    """Put a value without the writer."""
    environment = open_environment(environment_path(Path(store), 1), readonly=False)
    with environment.begin(write=True) as transaction:
        transaction.put(key, value)
    environment.close()
