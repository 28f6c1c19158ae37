"""Keys that name events: user, item, time, and action. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vista.arrays import Int
from vista.log.histories import ranges, token_groups
from vista.log.packed_table import PackedTable
from vista.log.segment import Segment
from vista.progress_bar import progress_bar

ROWS_AT_ONCE = 1 << 20
"""Default number of rows that are compared with keys at once."""


@dataclass(frozen=True, slots=True)
class EventKeys:
    """Keys of events: user and item rows, time (ms, or ordinal), and action code, int64 [N] each.

    action: None matches every action.
    """

    user: Int
    item: Int
    timestamp: Int
    action: Int | None

    def __len__(self) -> int:
        return len(self.user)

    def select(self, index: Int) -> EventKeys:
        action = None if self.action is None else self.action[index]
        return EventKeys(self.user[index], self.item[index], self.timestamp[index], action)


def forgotten_events(segment: Segment) -> EventKeys:
    """The keys in a segment's deletion rows."""
    table = segment.forgotten
    if table is None:
        return EventKeys(*(np.empty(0, np.int64) for _ in range(4)))
    user = np.repeat(table.users, np.diff(table.offsets))
    return EventKeys(user, *(table.columns[name].astype(np.int64) for name in ("item", "timestamp", "action")))


def equal_events(table: PackedTable, keys: EventKeys, *, rows_at_once: int = ROWS_AT_ONCE) -> tuple[Int, Int]:
    """All remaining rows of a table that match a key.

    Args:
        rows_at_once: rows at the times of keys that are compared at once; there are many if times are whole days. It
            never changes the result.

    Returns:
        (index of the key, row): int64 [M] each, by key, then by row.
    """
    start, count = table.locate(keys.user)
    here = np.flatnonzero(count)
    start, stop, times = start[here], start[here] + count[here], keys.timestamp[here]
    low = table.first_since(start, stop, times)
    num = table.first_since(low, stop, times + 1) - low
    pairs = [(here[:0], low[:0])]
    with progress_bar(total=len(num), desc="match events", unit="event", unit_scale=True, leave=False) as bar:
        for part in token_groups(num, rows_at_once):
            row, key = ranges(low[part], num[part]), np.repeat(here[part], num[part])
            place = table.places(row)
            equal = table.columns["item"][place] == keys.item[key]
            if keys.action is not None:
                equal &= table.columns["action"][place] == keys.action[key]
            pairs.append((key[equal], row[equal]))
            bar.update(len(num[part]))
    return np.concatenate([key for key, _ in pairs]), np.concatenate([row for _, row in pairs])
