"""Exact counters of users: made from their histories, extended by new events, and quantized for records.

N users, E counted keys of all users together, H horizons, F values per key (`CounterSpec`), T events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.counters.counter_codes import (
    STEPS_PER_EVENT,
    CounterCodes,
    CounterSpec,
    ItemKeys,
    cells_of,
    encode_event_counts,
    encode_values,
)
from vista.log.histories import NO_TIMESTAMP, ranges

# Exact counters of single keys, and how they add up event by event. E rows, H = len(days) + len(events) horizons.
#
# A decayed sum is kept relative to the half-life in which the key's newest event lies. With half-life h, an event at
# x = q·h + r, 0 ≤ r < h, adds 2^(r/h), and the sum before it is first multiplied by 2^(q' − q), where q' belongs to the
# event before. That factor is a power of two, so it rounds nothing. The sum therefore depends only on the events and
# their order, not on when they were added.

_FEW_KEYS = 8
"""At most this many keys are added up one after another: that is faster than a NumPy call for every event."""


@dataclass(frozen=True, slots=True)
class CounterRows:
    """Counters of E pairs of user and key."""

    key: Int
    """[E] at least 1."""
    count: Int
    """[E] number of events with this key."""
    decayed: NDArray[np.float64]
    """[E, H] sums relative to the half-life of the newest event: at least 1, below 2 · count."""
    last: Int
    """[E] time of the newest event with this key, ms."""
    last_position: Int
    """[E] its position in the user's history, from 0."""

    def __getitem__(self, index: Int) -> CounterRows:
        return CounterRows(*(getattr(self, field.name)[index] for field in fields(self)))

    @staticmethod
    def concatenated(parts: Sequence[CounterRows]) -> CounterRows:
        """The rows of all parts, end to end."""
        names = [field.name for field in fields(CounterRows)]
        return CounterRows(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    @staticmethod
    def of_events(spec: CounterSpec, key: Int, time: Int, position: Int) -> CounterRows:
        """One row per event: int64 [E] keys, times in ms, and positions in the user's history."""
        rows = CounterRows(key, np.ones_like(key), np.empty((len(key), spec.num_horizons)), time, position)
        for column, half_life in enumerate(spec.half_lives.tolist()):
            place = rows._place(spec, column)
            np.exp2((place - place // half_life * half_life) / half_life, out=rows.decayed[:, column])
        return rows

    def sums(self, spec: CounterSpec, now: Int, num_events: Int) -> NDArray[np.float64]:
        """The decayed sums as of the time `now` [E], in ms, and after `num_events` [E] events: float64 [E, H]."""
        sums = np.empty_like(self.decayed)
        for column, half_life in enumerate(spec.half_lives.tolist()):
            start = self._place(spec, column) // half_life * half_life
            at = now if column < len(spec.days) else (num_events - 1) * STEPS_PER_EVENT
            sums[:, column] = self.decayed[:, column] * np.exp2((start - at) / half_life)
        return sums

    def added_up(self, spec: CounterSpec, user: Int) -> tuple[Int, CounterRows, NDArray[np.bool_]]:
        """Sort by user and key, and add to each row all earlier rows of the same user and key.

        Args:
            spec: the horizons.
            user: int64 [E] user of each row, from 0. Rows of the same user and key are in the order of their events.

        Returns:
            user int64 [E]; the rows, each with the sums up to it; and bool [E], True for the newest row of its key.
        """
        cell = cells_of(user, self.key)
        order = np.argsort(cell, kind="stable")
        cell, rows = cell[order], self[order]
        is_first = np.ones(len(cell), np.bool_)
        np.not_equal(cell[1:], cell[:-1], out=is_first[1:])
        starts = np.flatnonzero(is_first)
        sizes = np.diff(starts, append=len(cell))

        total = np.cumsum(rows.count)
        rows.count[:] = total - np.repeat(total[starts] - rows.count[starts], sizes)
        factor = np.zeros_like(rows.decayed)
        for column, half_life in enumerate(spec.half_lives.tolist()):
            number = rows._place(spec, column) // half_life
            factor[1:, column] = np.ldexp(1.0, np.minimum(number[:-1] - number[1:], 0))
        _add_up(rows.decayed, factor, starts, sizes)
        return user[order], rows, np.append(is_first[1:], True)[: len(cell)]

    def _place(self, spec: CounterSpec, column: int) -> Int:
        """Where the newest event lies on the scale of a horizon, in the units of `CounterSpec.half_lives`."""
        return self.last if column < len(spec.days) else self.last_position * STEPS_PER_EVENT


def _add_up(sums: NDArray[np.float64], factor: NDArray[np.float64], starts: Int, sizes: Int) -> None:
    """sums[i] += factor[i] · sums[i − 1] within each group, in place, one event of all groups at a time.

    Args:
        sums: [E, H], of which the sums are made.
        factor: [E, H].
        starts: [G] first row of each group.
        sizes: [G] rows per group.
    """
    by_size = np.argsort(-sizes, kind="stable")
    starts, sizes = starts[by_size], sizes[by_size]
    num_longer = np.searchsorted(-sizes, -np.arange(sizes.max(initial=0)), side="left")
    steps = max(int(np.count_nonzero(num_longer > _FEW_KEYS)), 1)
    for step in range(1, steps):
        row = starts[: num_longer[step]] + step
        sums[row] += factor[row] * sums[row - 1]
    for start, size in zip(starts[sizes > steps].tolist(), sizes[sizes > steps].tolist(), strict=True):
        rest = slice(start + steps, start + size)
        for column in range(sums.shape[1]):
            total, totals = float(sums[start + steps - 1, column]), []
            for scale, term in zip(factor[rest, column].tolist(), sums[rest, column].tolist(), strict=True):
                total = scale * total + term
                totals.append(total)
            sums[rest, column] = totals


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


# Counters at any positions of histories, for training, where one history is cut at many points.
#
# N users, T events, n cuts.


class OccurrenceIndex:
    """Counters of N histories for one field, after each of their events.

    `table` is bit-identical to `CounterTable.of` on the events before the cut, but costs one pass of comparisons.
    """

    def __init__(self, spec: CounterSpec, key: Int, time: Int, offsets: Int) -> None:
        """Index N histories; arguments as in `CounterTable.of`."""
        self._spec, self._time, self._offsets = spec, time, offsets
        counts = np.diff(offsets)
        user = np.repeat(np.arange(len(counts)), counts)
        known = np.flatnonzero(key)
        position = known - offsets[user[known]]
        events = CounterRows.of_events(spec, np.asarray(key)[known].astype(np.int64), time[known], position)
        owner, self._rows, is_newest = events.added_up(spec, user[known])
        self._bounds = offsets_of_owners(owner, len(counts))
        self._next_position = np.append(self._rows.last_position[1:], 0)
        """[rows] position of the next event with the same key."""
        self._next_position[is_newest] = np.iinfo(np.int64).max

    def table(self, user: Int, position: Int) -> CounterTable:
        """Counters over the first position[i] events of user[i], for each cut: N = n.

        Args:
            user: int64 [n] from 0.
            position: int64 [n] from 0 to the number of events of the user.
        """
        newest, counts = [], np.zeros(len(user), np.int64)
        for cut, (start, stop, end) in enumerate(
            zip(self._bounds[user].tolist(), self._bounds[user + 1].tolist(), position.tolist(), strict=True)
        ):
            before = self._rows.last_position[start:stop] < end
            before &= self._next_position[start:stop] >= end
            found = np.flatnonzero(before)
            newest.append(found + start)
            counts[cut] = len(found)
        rows = self._rows[np.concatenate([np.zeros(0, np.int64), *newest])]
        offsets = offsets_of(counts)
        has_events = np.flatnonzero(position)
        clock = np.full(len(user), NO_TIMESTAMP)
        clock[has_events] = self._time[self._offsets[user[has_events]] + position[has_events] - 1]
        return CounterTable(self._spec, rows, offsets, clock, position)


@dataclass(frozen=True, slots=True)
class UserCounters:
    """Counters of B users, each as of a request."""

    codes: CounterCodes
    """Of the items, advanced to the requests."""
    num_events: Int
    """int64 [B] events that they cover: those of the record, and the newer ones that were added."""
    categories: tuple[CounterCodes, ...]
    """The same of the G - 1 fields after `item`."""
    keys: ItemKeys

    def of_pairs(self, user: Int, row: Int) -> NDArray[np.uint8]:
        """The codes that labeled tasks read for n pairs of user (0 .. B - 1) and model row: uint8 [n, G * F + 1].

        F codes of the item's counters, F of those of its value of each category, and one of the user's number of
        events. Codes of a field are 0 where its key is not counted, and all are if no key is.
        """
        fields = zip((self.codes, *self.categories), self.keys.of(row), strict=True)
        return self._with_event_counts(np.concatenate([one.lookup(user, key) for one, key in fields], 1), user)

    def of_counted_items(self) -> NDArray[np.uint8]:
        """Codes uint8 [E, G * F] of the E items that `codes` holds, and of their categories."""
        if not self.categories:
            return self.codes.codes
        owner, keys = self.codes.owner, self.keys.of(self.codes.key.astype(np.int64))[1:]
        of_categories = [one.lookup(owner, key) for one, key in zip(self.categories, keys, strict=True)]
        return np.concatenate([self.codes.codes, *of_categories], 1)

    def _with_event_counts(self, codes: NDArray[np.uint8], user: Int) -> NDArray[np.uint8]:
        """Codes uint8 [n, G * F] of pairs, with the codes of the numbers of events of users int64 [n]: uint8
        [n, G * F + 1]."""
        is_counted = codes[:, :: self.codes.spec.num_columns].any(1)
        num_events = np.where(is_counted, encode_event_counts(self.num_events)[user], np.uint8(0))
        return np.column_stack([codes, num_events])
