"""The events that a baseline may read, packed, with each event's user and age.

Letters: n users, T events.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vista.arrays import Int
from vista.log.event_log import EventLog


@dataclass(frozen=True, slots=True)
class VisibleEvents:
    """Events of n users, user by user, oldest first."""

    row: Int
    """int64 [T] 0 … n-1: whose event it is."""
    item: Int
    """int64 [T] rows of the log."""
    timestamp: Int
    """int64 [T] ms, or ordinals."""
    age: Int
    """int64 [T] number of later visible events of the user; 0 for the newest one."""
    offsets: Int
    """int64 [n + 1]."""


def visible_events(log: EventLog, user: Int, seen: Int, *, last: int | None = None) -> VisibleEvents:
    """The first `seen` events [n] of users [n]; with `last`, only the newest `last` of these."""
    start = np.zeros_like(seen) if last is None else np.maximum(seen - last, 0)
    events = log.gather_ranges(user, start, seen)
    row = np.repeat(np.arange(len(user)), events.lengths)
    age = events.offsets[1:][row] - 1 - np.arange(events.num_events)
    return VisibleEvents(row, events.item.astype(np.int64), np.asarray(events.timestamp), age, events.offsets)
