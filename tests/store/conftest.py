"""Stores with deterministic records: a user's record depends only on the user's number and the run's salt."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vista.counters.counters import CounterCodes, CounterSpec
from vista.errors import StoreError
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
from vista.store.backend import Folder
from vista.store.layout import environment_path, read_current
from vista.store.record import CounterLayout, TailColumn
from vista.store.writer import StoreUpdate

NUM_TOKENS, DIM = 2, 8
KEY = bytes(range(32))
TAIL_COLUMNS = [{"name": "surface", "size": 3}, {"name": "dwell", "size": None}]
COUNTERS = CounterLayout.of(CounterSpec(("item", "genre"), (4, 2)), [60_000, 20])


def summarizer(name: str = "a") -> bytes:
    return hashlib.sha256(name.encode()).digest()


def open_writer(
    path: Path, *, key: bytes | None = None, shared_with_group: bool = False, **changes: Any
) -> StoreWriter:
    """A writer of a manifest with changed fields."""
    fields: dict[str, Any] = {
        "summarizer_id": summarizer().hex(),
        "num_tokens": NUM_TOKENS,
        "dim": DIM,
        "codec": "int8",
        "tail_len": 4,
        "applied_segment": 0,
        "total_users": 40,
        "run_digest": "log-1",
        "created_at": 1_700_000_000_000,
    }
    return StoreWriter.open(path, Manifest(**{**fields, **changes}), key=key, shared_with_group=shared_with_group)


def summaries(users: range, salt: int = 0) -> np.ndarray:
    """[B, K, d]; every value of a user's summary is a function of user, salt and position."""
    place = np.arange(NUM_TOKENS * DIM, dtype=np.float32).reshape(NUM_TOKENS, DIM)
    return (place + np.array(users, dtype=np.float32)[:, None, None] + 1000 * salt).astype(np.float32)


def counters(users: range, layout: CounterLayout, salt: int = 0) -> tuple[CounterCodes, ...]:
    """Counters of user u with u % 5 items, at most 4, and u % 3 genres."""
    fields = []
    for lengths in (np.minimum(np.array(users) % 5, 4), np.array(users) % 3):
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        codes = (place[:, None] + np.arange(layout.spec.num_columns) + salt) % 64
        clock = np.array(users, np.int64) + 5
        fields.append(CounterCodes(layout.spec, (1 + place).astype(np.int32), codes.astype(np.uint8), offsets, clock))
    return tuple(fields)


def feature_of(column: TailColumn, values: np.ndarray) -> np.ndarray:
    """A function of the user of each event; users whose number is a multiple of 3 have no value."""
    if column.size is None:
        return np.where(values % 3, values / 2, np.nan).astype(np.float32)
    return np.where(values % 3, values % column.size, -1).astype(np.int32)


def users_of(keys: list[bytes], **fields: Any) -> UserSummaries:
    """Users without events, apart from these fields."""
    count = len(keys)
    nothing: dict[str, Any] = {"tail": Tail.empty(count), "event_count": np.zeros(count, np.int64)}
    nothing |= {"last_event_ts": np.full(count, NO_TIMESTAMP), "history_digest": np.zeros(count, np.uint64)}
    return UserSummaries(keys=keys, **nothing | fields)


def records_of(users: range, spec: RecordSpec, salt: int = 0) -> tuple[list[bytes], list[bytes]]:
    """Keys and records; the tail of user u holds u % 4 events."""
    lengths = np.array(users) % 4
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tail = Tail(
        np.repeat(np.array(users), lengths).astype(np.int32),
        np.repeat(np.array(users), lengths).astype(np.int64),
        np.ones(int(offsets[-1]), np.uint8),
        offsets,
        {column.name: feature_of(column, np.repeat(np.array(users), lengths)) for column in spec.tail_columns},
    )
    numbers = np.array(users, dtype=np.int64)
    held = users_of(
        user_keys(list(users)),
        summary=summaries(users, salt),
        tail=tail,
        event_count=numbers,
        last_event_ts=numbers + 5,
        history_digest=numbers.astype(np.uint64),
        counters=() if spec.counters is None else counters(users, spec.counters, salt),
    )
    return held.keys, encode_records(held, spec)


def put_users(writer: StoreWriter, users: range, salt: int = 0) -> None:
    """One batch of a new generation."""
    writer.put_batch(*records_of(users, writer.spec, salt), users.stop)


def update(path: Path, users: range, salt: int) -> None:
    """Replace users of the published generation in place, in batches of four, as an incremental refresh does."""
    with StoreUpdate.open(path, summarizer_id=summarizer(), applied_segment=1, created_at=1_700_000_000_001) as writer:
        for start in range(users.start, users.stop, 4):
            writer.put_batch(*records_of(range(start, min(start + 4, users.stop)), writer.spec, salt))
        writer.finish()


def write_store(path: Path, salt: int = 0, *, batch: int = 16, **changes: Any) -> Manifest:
    with open_writer(path, **changes) as writer:
        total = writer.manifest.total_users
        for start in range(writer.cursor, total, batch):
            put_users(writer, range(start, min(start + batch, total)), salt)
        return writer.publish()


def write_generations(root: Path, count: int = 2, **changes: Any) -> None:
    """Generations 1, 2, …, each with other summaries."""
    for salt in range(count):
        write_store(root, salt, run_digest=f"log-{salt + 1}", **changes)


def records(root: Path, generation: int | None = None, key: bytes | None = None) -> dict[bytes, bytes]:
    """Keys and records of a generation, by default the published one."""
    with Folder(root).open(read_current(root) if generation is None else generation, key) as reader:
        return dict(pair for batch in reader.batches() for pair in zip(*batch, strict=True))


def found(store: str | Path, users: Any, **options: Any) -> list[bool]:
    """Which of these users the published generation has a record of."""
    with StoreReader.open(store, **options) as reader:
        answer: list[bool] = reader.get_many(users).found.tolist()
        return answer


def damage_record(root: Path, generation: int, user: int) -> bytes:
    """Change the last byte of a user's record; returns the data file as it was."""
    data = environment_path(root, generation) / "data.mdb"
    whole, record = data.read_bytes(), records(root, generation)[user_keys([user])[0]]
    data.write_bytes(whole.replace(record, record[:-1] + bytes([record[-1] ^ 1])))
    return whole


def killed_at(number: int, owner: Any, name: str, act: Callable[[], object], *, after: bool = False) -> int:
    """Exit code of a process that acts, and is killed before, or `after`, its n-th call of a function."""
    pid = os.fork()
    if pid == 0:
        function, numbers, code = getattr(owner, name), count(1), 1

        def call_or_die(*arguments: Any, **options: Any) -> Any:
            is_last = next(numbers) == number
            if is_last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if is_last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        try:
            setattr(owner, name, call_or_die)
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def build() -> SimpleNamespace:
    """The functions above."""
    return SimpleNamespace(
        open_writer=open_writer,
        put_users=put_users,
        records_of=records_of,
        update=update,
        counters=counters,
        layout=COUNTERS,
        tail_columns=TAIL_COLUMNS,
        feature_of=feature_of,
        summaries=summaries,
        summarizer=summarizer,
        write_store=write_store,
    )


@dataclass(frozen=True)
class OtherAccount:
    """Runs functions in a child process of another account."""

    folder: Path
    """An empty folder that this account can pass through. Other pytest runs make the folders of tmp_path private."""
    user: int = 60_001
    group: int = 60_002

    def __call__(self, function: Callable[[], Any]) -> Any:
        """The function's result, or the StoreError that it raises."""
        receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

        def call() -> None:
            os.setgroups([])
            os.setgid(self.group)
            os.setuid(self.user)
            try:
                sender.send(function())
            except StoreError as error:
                sender.send(error)

        child = multiprocessing.get_context("fork").Process(target=call)
        child.start()
        sender.close()
        assert receiver.poll(60), "the child hangs"
        result = receiver.recv()
        child.join(60)
        return result


@pytest.fixture
def as_other_account() -> Iterator[OtherAccount]:
    """An account other than that of the tests."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as another account")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)
        yield OtherAccount(Path(folder))
