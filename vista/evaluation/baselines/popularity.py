"""Popularity: an item's number of visible events."""

from __future__ import annotations

import numpy as np

from vista.arrays import Floats, Int
from vista.examples.frequency import item_counts
from vista.log.event_log import EventLog

_TIE_SCALE = 1e-9


class Popularity:
    """The same scores for all users: float64 event counts."""

    name = "popularity"

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._counts: Floats = item_counts(log, counts).astype(np.float64)

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        return np.tile(self._counts, (len(user), 1))


def tie_breaker(popularity: Int) -> Floats:
    """float64 [V] in [0, 1e-9): added to other scores, it ranks items that tie by their popularity."""
    tie: Floats = popularity * (_TIE_SCALE / (popularity.max(initial=0) + 1))
    return tie
