"""The popularity of items after the question, which nobody knows when it is asked: an upper bound."""

from __future__ import annotations

import numpy as np

from vista.arrays import Floats, Int
from vista.examples.item_statistics import item_counts
from vista.log.event_log import EventLog


class PopularityAfterwards:
    """The same scores for all users: float64 counts of the events that are not visible."""

    name = "popularity afterwards"

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._counts: Floats = (item_counts(log) - item_counts(log, counts)).astype(np.float64)

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        return np.tile(self._counts, (len(user), 1))
