"""Counters of every item that a user had: what trees learn from.

Letters: n users, E pairs of a user and an item that the user had, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vista.arrays import Floats, Int
from vista.log.event_log import EventLog
from vista.log.gaps import DAY_MS

_LAST = (32, 200)
"""Numbers of newest events that are counted, and horizons of decay in events."""
_DAYS = (7, 30, 90)
"""Horizons of decay in days."""


@dataclass(frozen=True, slots=True)
class CounterFeatures:
    """Features of E pairs, sorted by user, then item."""

    row: Int
    """int64 [E] 0 … n-1."""
    item: Int
    """int64 [E] rows of the log."""
    value: Floats
    """float64 [E, F]: number of events, in all and among the newest; sums that decay with the number of later events;
    events later than the newest one of the item; log of the history's length; popularity. In a log with times also sums
    that decay over days, and the ages of the item's newest and oldest event in days."""


def counter_features(log: EventLog, user: Int, seen: Int, now: Int | None, popularity: Int) -> CounterFeatures:
    """Count the first `seen` events of users [n].

    Args:
        now: int64 [n] ms, the time from which ages in days count; None counts from each user's newest event.
        popularity: int64 [V] visible events of each item, in all histories.
    """
    events = log.gather(user, seen, features=False)
    owner, age = events.owner, events.age
    cell, inverse = np.unique(owner * log.num_items + events.item, return_inverse=True)
    row, item = np.divmod(cell, log.num_items)

    def total(weight: Floats | None = None) -> Floats:
        return np.bincount(inverse, weight, len(cell)).astype(np.float64)

    def least(value: Floats) -> Floats:
        out = np.full(len(cell), np.inf)
        np.minimum.at(out, inverse, value)
        return out

    columns = [total()]
    columns += [total((age < last).astype(np.float64)) for last in _LAST]
    columns += [total(np.exp(-age / last)) for last in _LAST]
    columns += [least(age.astype(np.float64)), np.log(seen[row]), popularity[item].astype(np.float64)]
    if log.has_time:
        asked = events.timestamp[events.offsets[1:] - 1] if now is None else now
        days = (asked[owner] - events.timestamp) / DAY_MS
        columns += [total(np.exp(-days / horizon)) for horizon in _DAYS]
        columns += [least(days), -least(-days)]
    return CounterFeatures(row, item, np.stack(columns, axis=1))
