"""From the summaries of a batch of users to the bytes that the store keeps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.errors import RecordError
from vista.log.histories import Histories
from vista.refresh.refresh_progress import RefreshProgress
from vista.store.format.keys import user_id
from vista.store.format.record import encode_records
from vista.store.format.state_record import StateArrays, encode_states
from vista.store.stored_batch import NO_TIMESTAMP
from vista.store.tail import Tail
from vista.store.update import StoreUpdate
from vista.store.writer import StoreWriter


@dataclass(frozen=True, slots=True)
class UserSummaries:
    """Everything that the records of N users hold, before encoding."""

    keys: list[bytes]
    """N keys of `vista.store.format.keys.user_keys`."""
    summary: NDArray[np.float32]
    """[N, K, d]."""
    tail: Tail
    """The last events of the N users, items as rows of the model."""
    last_event_ts: Int
    """[N] time of the newest event; NO_TIMESTAMP without events."""
    event_count: Int
    """[N] events of the whole histories."""
    history_digest: NDArray[np.uint64]
    """[N] of the whole histories."""
    states: StateArrays | None
    """Of the N users; None if the store keeps no states."""

    def __getitem__(self, row: int) -> UserSummaries:
        """One user's (N = 1)."""
        one = slice(row, row + 1)
        return UserSummaries(
            self.keys[one],
            self.summary[one],
            self.tail.of_user(row),
            self.last_event_ts[one],
            self.event_count[one],
            self.history_digest[one],
            None if self.states is None else self.states[one],
        )


@dataclass(frozen=True, slots=True)
class UserRecords:
    """What one batch writes: a key, a record and, if the store keeps states, a state per user."""

    keys: list[bytes]
    records: list[bytes]
    states: list[bytes]

    @classmethod
    def empty(cls) -> UserRecords:
        """Of nobody."""
        return cls([], [], [])

    def extend(self, other: UserRecords) -> None:
        """Append another batch."""
        self.keys.extend(other.keys)
        self.records.extend(other.records)
        self.states.extend(other.states)


def encode_users(users: UserSummaries, writer: StoreWriter | StoreUpdate, run: RefreshProgress) -> UserRecords:
    """Encode records and states as `writer` expects them.

    Users whose summary cannot be stored are left out and reported to `run` as failed.
    """
    try:
        records = encode_records(
            users.keys,
            users.summary,
            users.tail,
            spec=writer.spec,
            event_count=users.event_count,
            last_event_ts=users.last_event_ts,
            history_digest=users.history_digest,
        )
    except RecordError as error:
        encoded = UserRecords.empty()
        if len(users.keys) == 1:
            run.failed(user_id(users.keys[0]), str(error))
            return encoded
        for row in range(len(users.keys)):
            encoded.extend(encode_users(users[row], writer, run))
        return encoded
    states = []
    if users.states is not None and writer.state_spec is not None:
        states = encode_states(users.keys, users.states, writer.state_spec)
    return UserRecords(users.keys, records, states)


def write_batch(
    encoded: UserRecords, writer: StoreWriter, run: RefreshProgress, *, num_users: int, num_events: int
) -> None:
    """Write the next batch of a new generation durably, and count its users.

    Args:
        num_users: users of the batch, also those whose records could not be encoded.
        num_events: events that were summarized for them.

    Raises:
        RecordError: too many users failed.
    """
    run.check_failures()
    with run.stage("write"):
        written = writer.put_batch(encoded.keys, encoded.records, writer.cursor + num_users, encoded.states)
    run.counts["written"] += written
    run.counts["erased"] += len(encoded.keys) - written
    run.batch(writer.generation, num_users, num_events)


def stored_tail(newest: Histories, tail_len: int) -> Tail:
    """The last `tail_len` events of histories whose items are rows of the model, in the form of a record."""
    last = newest.select(np.maximum(newest.lengths - tail_len, 0), newest.lengths)
    return Tail(last.item.astype(np.int32), np.asarray(last.timestamp), np.asarray(last.action), last.offsets)


def last_times(histories: Histories) -> Int:
    """Times of the newest events, int64 [B]; NO_TIMESTAMP for an empty history."""
    if histories.num_events == 0:
        return np.full(histories.num_users, NO_TIMESTAMP, np.int64)
    times = np.asarray(histories.timestamp)[np.maximum(histories.offsets[1:] - 1, 0)]
    return np.where(histories.lengths > 0, times, NO_TIMESTAMP)
