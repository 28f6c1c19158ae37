"""First-order transitions: what came right after the user's newest item, over all users."""

from __future__ import annotations

import numpy as np

from vista.arrays import Int
from vista.evaluation.baselines.own_frequency import OwnFrequency
from vista.evaluation.baselines.sparse_rows import transition_counts
from vista.evaluation.baselines.visible_events import visible_events
from vista.evaluation.metrics import Floats
from vista.examples.frequency import item_counts
from vista.log.event_log import EventLog


class Transitions:
    """Score of item i after the newest visible item j: n_ji (max n + 1) + n_i, so popularity n_i breaks ties."""

    name = "transitions"

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log = log
        self._pairs = transition_counts(log, counts)
        self._popularity: Floats = item_counts(log, counts).astype(np.float64)
        # One transition outweighs any popularity. Sums of integers, so exact.
        self._weight = self._popularity.max(initial=0) + 1

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        newest = visible_events(self._log, user, seen, last=1)
        place, count = self._pairs.cells(newest.item)
        out = np.tile(self._popularity, (len(user), 1))
        out[np.repeat(newest.row, count), self._pairs.column[place]] += self._pairs.value[place] * self._weight
        return out


class TransitionsAndOwn:
    """Own frequency as a share of the user's events, plus `weight` times the share of transitions from the newest item.

    Items that have neither rank by popularity.
    """

    name = "transitions and own frequency"

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._own = OwnFrequency()

    def choose(self, value: float) -> None:
        """Set the weight of the transitions."""
        self._weight = value

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log = log
        self._own.fit(log, counts, rng)
        self._pairs = transition_counts(log, counts)
        row = np.repeat(np.arange(log.num_items), np.diff(self._pairs.offsets))
        self._leaving = np.bincount(row, self._pairs.value, log.num_items)

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        out = self._own.scores(user, seen, now) / np.maximum(seen, 1)[:, None]
        newest = visible_events(self._log, user, seen, last=1)
        place, count = self._pairs.cells(newest.item)
        share = self._pairs.value[place] / np.repeat(self._leaving[newest.item], count)
        out[np.repeat(newest.row, count), self._pairs.column[place]] += self._weight * share
        return out
