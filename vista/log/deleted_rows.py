"""What deletion rows take away from the segments before them. NumPy only.

A forgotten event is gone from every earlier segment, however often it stands there; an erased user loses all events and
impressions of earlier segments. What comes again in the same or a later segment counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vista.log.histories import ranges, token_groups
from vista.log.packed_table import Int, PackedTable
from vista.log.segment import Segment

_ROWS_AT_ONCE = 1 << 20
"""Rows at the times of keys that are compared at once: where times are whole days, they are many."""


@dataclass(frozen=True, slots=True)
class EventKeys:
    """What names events: user and item rows, time (ms, or ordinal) and action code, int64 [N] each.

    action: None stands for every action.
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
    """The events that a segment's deletion rows name."""
    table = segment.forgotten
    if table is None:
        return EventKeys(*(np.empty(0, np.int64) for _ in range(4)))
    user = np.repeat(table.users, np.diff(table.offsets))
    return EventKeys(user, *(table.columns[name].astype(np.int64) for name in ("item", "timestamp", "action")))


def equal_events(table: PackedTable, keys: EventKeys) -> tuple[Int, Int]:
    """Every remaining row of a table that a key names.

    Returns:
        (which key, which row): int64 [M] each, by key, then by row.
    """
    start, count = table.locate(keys.user)
    here = np.flatnonzero(count)
    start, stop, times = start[here], start[here] + count[here], keys.timestamp[here]
    low = table.first_since(start, stop, times)
    num = table.first_since(low, stop, times + 1) - low
    found = [(here[:0], low[:0])]
    for part in token_groups(num, _ROWS_AT_ONCE):
        row, key = ranges(low[part], num[part]), np.repeat(here[part], num[part])
        place = table.places(row)
        equal = table.columns["item"][place] == keys.item[key]
        if keys.action is not None:
            equal &= table.columns["action"][place] == keys.action[key]
        found.append((key[equal], row[equal]))
    return np.concatenate([key for key, _ in found]), np.concatenate([row for _, row in found])


def obey_deletions(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """The segments, oldest first, each without what later ones delete. Reads the users that are concerned alone."""
    if not any(segment.num_deletions for segment in segments[1:]):
        return tuple(segments)
    left = []
    forgotten: list[EventKeys] = []
    erased = np.empty(0, np.int64)
    for segment in reversed(segments):
        gone = [equal_events(segment.events, keys)[1] for keys in forgotten]
        events = segment.events.without(np.unique(np.concatenate([_rows_of(segment.events, erased), *gone])))
        impressions = segment.impressions
        if impressions is not None:
            impressions = impressions.without(_rows_of(impressions, erased))
        left.append(replace(segment, events=events, impressions=impressions))
        forgotten += [forgotten_events(segment)] if segment.forgotten is not None else []
        erased = np.union1d(erased, segment.erased)
    return tuple(reversed(left))


def _rows_of(table: PackedTable, users: Int) -> Int:
    return ranges(*table.locate(users))
