"""The bytes that the store keeps for a batch of users, encoded from their summaries."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vista.arrays import Int
from vista.errors import RecordError
from vista.log.histories import NO_TIMESTAMP, Histories
from vista.model.vista_model import VistaModel
from vista.store.format.keys import user_id
from vista.store.format.record import encode_records
from vista.store.format.record_spec import RecordSpec
from vista.store.format.state_record import StateSpec, encode_states
from vista.store.tail import Tail
from vista.store.user_summaries import UserSummaries


@dataclass(slots=True)
class UserRecords:
    """What one batch writes: a key, a record and, if the store keeps states, a state per user."""

    keys: list[bytes]
    records: list[bytes]
    states: list[bytes]
    num_events: int = 0
    """Events that were summarized, with those of users that failed."""
    failures: dict[str, str] = field(default_factory=dict)
    """Users whose summary cannot be stored, with the reason; they have no record."""

    @classmethod
    def empty(cls) -> UserRecords:
        """The records of an empty batch."""
        return cls([], [], [])

    def extend(self, other: UserRecords) -> None:
        """Append the records of another batch."""
        self.keys.extend(other.keys)
        self.records.extend(other.records)
        self.states.extend(other.states)
        self.num_events += other.num_events
        self.failures.update(other.failures)


def encode_users(users: UserSummaries, spec: RecordSpec, state_spec: StateSpec | None) -> UserRecords:
    """Encode records and, if there is a `state_spec`, states. Users whose summary cannot be stored are `failures`."""
    num_events = int(users.event_count.sum())
    try:
        records = encode_records(users, spec)
    except RecordError as error:
        if len(users) == 1:
            return UserRecords([], [], [], num_events, {str(user_id(users.keys[0])): str(error)})
        encoded = UserRecords.empty()
        for row in range(len(users)):
            encoded.extend(encode_users(users[row], spec, state_spec))
        return encoded
    states = []
    if users.states is not None and state_spec is not None:
        states = encode_states(users.keys, users.states, state_spec)
    return UserRecords(users.keys, records, states, num_events)


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
