"""Own frequency: how often the user had each item before. It ranks returns, and no new item above another by merit."""

from __future__ import annotations

import numpy as np

from vista.arrays import Floats, Int
from vista.evaluation.baselines.popularity import tie_breaker
from vista.examples.frequency import item_counts
from vista.log.event_log import EventLog
from vista.log.gaps import DAY_MS


class OwnFrequency:
    """Sum of weights of the user's events of an item. Items that tie, such as all new ones, rank by popularity.

    An event weighs 1, or less with its age: exp(-age / days), exp(-age / events). Ages in days count from the newest
    visible event: a later question changes all sums by the same factor.
    """

    def __init__(self, *, last: int | None = None, days: float | None = None, events: float | None = None) -> None:
        """
        Args:
            last: count only so many newest events.
            days: time in which an event's weight falls by the factor e.
            events: number of later events with which an event's weight falls by the factor e.
        """
        self._last, self._days, self._events = last, days, events
        limits = {"last {} events": last, "decay {:g} days": days, "decay {:g} events": events}
        self.name = ", ".join(["own frequency", *(text.format(x) for text, x in limits.items() if x is not None)])

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log = log
        self._tie = tie_breaker(item_counts(log, counts))

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        start = np.zeros_like(seen) if self._last is None else seen - self._last
        events = self._log.gather_ranges(user, start, seen, features=False)
        owner, exponent = events.owner, np.zeros(events.num_events)
        if self._events is not None:
            exponent += events.age / self._events
        if self._days is not None:
            newest = events.timestamp[events.offsets[1:][owner] - 1]
            exponent += (newest - events.timestamp) / (self._days * DAY_MS)
        num_items = self._log.num_items
        cell = owner * num_items + events.item
        sums = np.bincount(cell, np.exp(-exponent), len(user) * num_items).reshape(len(user), num_items)
        return sums + self._tie
