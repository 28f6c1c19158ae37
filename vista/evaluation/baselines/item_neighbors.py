"""Item neighbors: items that occur near those of the user's history, in all histories."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vista.arrays import Floats, Int
from vista.evaluation.baselines.popularity import tie_breaker
from vista.evaluation.baselines.sparse_rows import co_occurrences
from vista.examples.frequency import item_counts
from vista.log.event_log import EventLog


class ItemNeighbors:
    """Sum over the user's events j of c_ij / sqrt(n_i n_j): c_ij pairs within REACH events, n_i events of item i.

    An item is not its own neighbor. Items that tie rank by popularity.
    """

    def __init__(self, *, last: int | None = None) -> None:
        """
        Args:
            last: sum over so many newest events; None sums over the whole history.
        """
        self._last = last
        self.name = "item neighbors" if last is None else f"item neighbors, last {last} events"

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log = log
        popularity = item_counts(log, counts)
        self._tie = tie_breaker(popularity)
        pairs = co_occurrences(log, counts, rng)
        scale = 1 / np.sqrt(np.maximum(popularity, 1))
        self._similarity = replace(pairs, value=pairs.value * scale[pairs.row] * scale[pairs.column])

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        start = np.zeros_like(seen) if self._last is None else seen - self._last
        events = self._log.gather_ranges(user, start, seen, features=False)
        out = np.empty((len(user), self._log.num_items))
        for row, (begin, end) in enumerate(zip(events.offsets[:-1], events.offsets[1:], strict=True)):
            item, times = np.unique(events.item[begin:end], return_counts=True)
            out[row] = self._similarity.weighted_sum(item, times.astype(np.float64)) + self._tie
        return out
