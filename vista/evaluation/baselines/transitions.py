"""First-order transitions: what came right after the user's newest item, over all users."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vista.arrays import Floats, Int
from vista.evaluation.baselines.own_frequency import OwnFrequency
from vista.evaluation.baselines.sparse_rows import SparseRows, transition_counts
from vista.examples.frequency import item_counts
from vista.log.event_log import EventLog
from vista.log.histories import Histories


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
        out = np.tile(self._popularity, (len(user), 1))
        _add_followers(out, self._pairs, self._weight, self._log.gather_ranges(user, seen - 1, seen))
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
        pairs = transition_counts(log, counts)
        leaving = np.bincount(pairs.row, pairs.value, log.num_items)
        self._shares = replace(pairs, value=pairs.value / leaving[pairs.row])

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        out = self._own.scores(user, seen, now) / np.maximum(seen, 1)[:, None]
        _add_followers(out, self._shares, self._weight, self._log.gather_ranges(user, seen - 1, seen))
        return out


def _add_followers(out: Floats, pairs: SparseRows, weight: float, newest: Histories) -> None:
    """Add the weighted row of each user's newest item to out [n, V]. A user without events adds nothing."""
    place, count = pairs.cells(newest.item)
    out[np.repeat(newest.owner, count), pairs.column[place]] += weight * pairs.value[place]
