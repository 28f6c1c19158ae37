"""The bytes that the store keeps for a batch of users, encoded from their summaries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vista.arrays import Int
from vista.errors import RecordError
from vista.log.gaps import NO_TIMESTAMP
from vista.log.histories import Histories
from vista.model.vista_model import VistaModel
from vista.refresh.refresh_progress import RefreshProgress
from vista.store.format.keys import user_id
from vista.store.format.record import encode_records
from vista.store.format.state_record import encode_states
from vista.store.tail import Tail
from vista.store.update import StoreUpdate
from vista.store.user_summaries import UserSummaries
from vista.store.writer import StoreWriter


@dataclass(frozen=True, slots=True)
class UserRecords:
    """What one batch writes: a key, a record and, if the store keeps states, a state per user."""

    keys: list[bytes]
    records: list[bytes]
    states: list[bytes]

    @classmethod
    def empty(cls) -> UserRecords:
        """The records of an empty batch."""
        return cls([], [], [])

    def extend(self, other: UserRecords) -> None:
        """Append the records of another batch."""
        self.keys.extend(other.keys)
        self.records.extend(other.records)
        self.states.extend(other.states)


def encode_users(users: UserSummaries, writer: StoreWriter | StoreUpdate, run: RefreshProgress) -> UserRecords:
    """Encode records and states as `writer` expects them.

    Users whose summary cannot be stored are left out and reported to `run` as failed.
    """
    try:
        records = encode_records(users, writer.spec)
    except RecordError as error:
        encoded = UserRecords.empty()
        if len(users) == 1:
            run.failed(user_id(users.keys[0]), str(error))
            return encoded
        for row in range(len(users)):
            encoded.extend(encode_users(users[row], writer, run))
        return encoded
    run.encoded(records)
    states = []
    if users.states is not None and writer.state_spec is not None:
        states = encode_states(users.keys, users.states, writer.state_spec)
    return UserRecords(users.keys, records, states)


def stored_tail(model: VistaModel, newest: Histories) -> Tail:
    """The last `tail_len` events of histories as `LogItems.model_rows` gives them, in the form of a record."""
    last = newest.select(np.maximum(newest.lengths - model.config.tail_len, 0), newest.lengths)
    features = {name: last.features.columns[name] for name in model.schema.tail_sizes}
    times, actions = np.asarray(last.timestamp), np.asarray(last.action)
    return Tail(last.item.astype(np.int32), times, actions, last.offsets, features)


def last_times(histories: Histories) -> Int:
    """Times of the newest events, int64 [B]; NO_TIMESTAMP for an empty history."""
    if histories.num_events == 0:
        return np.full(histories.num_users, NO_TIMESTAMP, np.int64)
    times = np.asarray(histories.timestamp)[np.maximum(histories.offsets[1:] - 1, 0)]
    return np.where(histories.lengths > 0, times, NO_TIMESTAMP)
