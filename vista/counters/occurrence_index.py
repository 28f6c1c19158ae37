"""Counters at any positions of histories, for training, where one history is cut at many points.

N users, T events, n cuts.
"""

from __future__ import annotations

import numpy as np

from vista.arrays import Int, offsets_of
from vista.counters.counter_rows import CounterRows
from vista.counters.counter_spec import CounterSpec
from vista.counters.counter_table import CounterTable, offsets_of_owners
from vista.log.gaps import NO_TIMESTAMP


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
