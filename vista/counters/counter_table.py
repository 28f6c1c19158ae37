"""Exact counters of users: made from their histories, extended by new events, and quantized for records.

N users, E counted keys of all users together, H horizons, F values per key (`CounterSpec`), T events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.counters.counter_codes import CounterCodes, encode_values
from vista.counters.counter_rows import CounterRows
from vista.counters.counter_spec import CounterSpec
from vista.log.gaps import NO_TIMESTAMP
from vista.log.histories import ranges


@dataclass(frozen=True, slots=True)
class CounterTable:
    """Exact counters of N users for one field, packed: users end to end, keys ascending per user.

    Events can be appended, but not removed: after a deletion or a late event, count the history again with `of`.
    """

    spec: CounterSpec
    rows: CounterRows
    """[E]."""
    offsets: Int
    """[N + 1]."""
    clock: Int
    """[N] time of the newest event, ms; NO_TIMESTAMP without events."""
    num_events: Int
    """[N] events of the history, including those with key 0."""

    @classmethod
    def of(cls, spec: CounterSpec, key: Int, time: Int, offsets: Int) -> CounterTable:
        """Count N histories.

        Args:
            spec: the horizons.
            key: int [T] keys of the events, oldest first per user. Key 0 is not counted, but it is an event.
            time: int64 [T] their times in ms; ordinals without times.
            offsets: int64 [N + 1] of the users in key and time.
        """
        none, num_events = np.zeros(0, np.int64), np.zeros(len(offsets) - 1, np.int64)
        rows = CounterRows(none, none, np.zeros((0, spec.num_horizons)), none, none)
        clock = np.full_like(num_events, NO_TIMESTAMP)
        return cls(spec, rows, np.zeros_like(offsets), clock, num_events).appended(key, time, offsets)

    def appended(self, key: Int, time: Int, offsets: Int) -> CounterTable:
        """The counters with newer events added: bit-identical to those of the longer histories.

        Args:
            key: int [T] keys of the new events, as in `of`.
            time: int64 [T] their times.
            offsets: int64 [N + 1] of the users in key and time.

        Raises:
            ValueError: a new event of a user is older than an earlier one; count that history again.
        """
        counts = np.diff(offsets)
        user = np.repeat(np.arange(len(counts)), counts)
        index = np.arange(len(key))
        position = index - offsets[user] + self.num_events[user]
        late = np.flatnonzero(time < np.where(index == offsets[user], self.clock[user], time[index - 1]))
        if len(late):
            raise ValueError(
                f"user {user[late[0]]}: the event at position {position[late[0]]} is older than the event before; sort "
                "the events by time, or count the whole history again"
            )
        known = np.flatnonzero(key)
        events = CounterRows.of_events(self.spec, np.asarray(key)[known].astype(np.int64), time[known], position[known])
        rows = CounterRows.concatenated([self.rows, events])
        owner, rows, is_newest = rows.added_up(self.spec, np.concatenate([self.owner, user[known]]))
        newest = np.flatnonzero(is_newest)
        clock = self.clock.copy()
        has_new = np.flatnonzero(counts)
        clock[has_new] = time[offsets[1:][has_new] - 1]
        return CounterTable(
            self.spec, rows[newest], offsets_of_owners(owner[newest], len(counts)), clock, self.num_events + counts
        )

    @property
    def owner(self) -> Int:
        """User of each row, 0 .. N - 1: int64 [E]."""
        return np.repeat(np.arange(len(self.clock)), np.diff(self.offsets))

    def values(self) -> NDArray[np.float64]:
        """Values as of each user's newest event: float64 [E, F], with the columns of `CounterSpec`."""
        now, num_events = self.clock[self.owner], self.num_events[self.owner]
        age = self.spec.age(now - self.rows.last, num_events - 1 - self.rows.last_position)
        return np.column_stack([self.rows.count, self.rows.sums(self.spec, now, num_events), age])

    def top(self, num_keys: int) -> CounterTable:
        """Only the `num_keys` keys per user with the highest counts; of equal counts, the most recent ones."""
        owner = self.owner
        order = np.lexsort((-self.rows.last_position, -self.rows.count, owner))
        rank = np.arange(len(order)) - self.offsets[owner]
        kept = np.sort(order[rank < num_keys])
        offsets = offsets_of_owners(owner[kept], len(self.clock))
        return CounterTable(self.spec, self.rows[kept], offsets, self.clock, self.num_events)

    def codes(self) -> CounterCodes:
        """The counters quantized, as of each user's newest event. Take the `top` ones first."""
        codes = encode_values(self.spec, self.values())
        return CounterCodes(self.spec, self.rows.key.astype(np.int32), codes, self.offsets, self.clock)

    def select(self, users: Int) -> CounterTable:
        """Counters of these users, in this order; a user may appear several times."""
        counts = np.diff(self.offsets)[users]
        rows = self.rows[ranges(self.offsets[users], counts)]
        offsets = offsets_of(counts)
        return CounterTable(self.spec, rows, offsets, self.clock[users], self.num_events[users])

    @staticmethod
    def concatenated(parts: Sequence[CounterTable]) -> CounterTable:
        """The users of all parts, end to end; at least one part."""
        rows = CounterRows.concatenated([part.rows for part in parts])
        sizes = np.concatenate([np.diff(part.offsets) for part in parts])
        offsets = offsets_of(sizes)
        clock, num_events = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("clock", "num_events")
        )
        return CounterTable(parts[0].spec, rows, offsets, clock, num_events)


def offsets_of_owners(owner: Int, num_users: int) -> Int:
    """Offsets [N + 1] of packed rows with ascending owners."""
    return np.searchsorted(owner, np.arange(num_users + 1))
