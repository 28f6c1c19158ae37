"""TIFU-KNN (Hu et al., SIGIR 2020, arXiv 2006.00556): personal item frequency with two decays, and nearest neighbors.

Letters: n users that are asked at once, U users of the log, V items.
"""

from __future__ import annotations

import numpy as np

from vista.arrays import Floats, Int
from vista.evaluation.baselines.popularity import tie_breaker
from vista.evaluation.baselines.sparse_rows import SparseRows
from vista.examples.frequency import item_counts
from vista.log.event_log import EventLog
from vista.log.histories import ranges

BASKET_GAP_MS = 30 * 60_000
"""A longer time between two events begins a new basket. In a log without times, every event is a basket."""


class TifuKnn:
    """own_weight v_u + (1 - own_weight) mean of v over the nearest users, by Euclidean distance.

    A user's baskets b are divided into up to `num_groups` groups of equal size, the older ones smaller by one basket if
    they do not divide evenly. With k baskets per group and m groups, both counted 1 … from the oldest,

        v_group = Σ_j within_decay^(k - j) b_j / k,    v_u = Σ_i group_decay^(m - i) v_group_i / m

    as in the publication. (The authors' program counts within_decay over the whole history.) Items that tie rank by
    popularity.
    """

    name = "TIFU-KNN"

    def __init__(
        self,
        *,
        within_decay: float = 0.9,
        group_decay: float = 0.7,
        num_groups: int = 7,
        num_neighbors: int = 300,
        own_weight: float = 0.7,
    ) -> None:
        """The defaults are the authors' for most of their sets."""
        self._within_decay, self._group_decay, self._num_groups = within_decay, group_decay, num_groups
        self._num_neighbors, self._own_weight = num_neighbors, own_weight
        self._known: SparseRows | None = None

    def choose(self, value: tuple[float, float]) -> None:
        """Set group_decay and own_weight."""
        group_decay, self._own_weight = value
        if group_decay != self._group_decay:
            self._group_decay, self._known = group_decay, None

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log = log
        self._tie = tie_breaker(item_counts(log, counts))
        self._users = np.flatnonzero(counts > 0)
        self._counts, self._known = counts[self._users], None

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        if self._known is None:
            self._known = self._vectors(self._users, self._counts)
        own = self._vectors(user, seen).dense()
        out = self._own_weight * own + self._tie
        for row, neighbors in enumerate(self._nearest(self._known, user, own)):
            share = (1 - self._own_weight) / max(len(neighbors), 1)
            out[row] += self._known.weighted_sum(neighbors, np.full(len(neighbors), share))
        return out

    def _nearest(self, known: SparseRows, user: Int, own: Floats) -> Int:
        """int64 [n, k] places in `_users` of the nearest other users."""
        norm = np.add.reduceat(np.append(known.value**2, 0), known.offsets[:-1])
        distance = np.empty((len(user), len(self._users)))
        for row, vector in enumerate(own):
            products = np.append(vector[known.column] * known.value, 0)
            distance[row] = norm - 2 * np.add.reduceat(products, known.offsets[:-1])
        distance[user[:, None] == self._users] = np.inf  # a user is not a neighbor of their own
        others = len(self._users) - np.isin(user, self._users)
        count = min(self._num_neighbors, int(others.min(initial=len(self._users))))
        return np.argsort(distance, axis=1, kind="stable")[:, :count]

    def _vectors(self, user: Int, seen: Int) -> SparseRows:
        """v_u of users [n]."""
        events = self._log.gather(user, seen, features=False)
        first = np.zeros(len(events.item), np.bool_)
        first[events.offsets[:-1][np.diff(events.offsets) > 0]] = True
        gap = np.diff(events.timestamp, prepend=0)
        starts = first | (gap > BASKET_GAP_MS) if self._log.has_time else np.ones_like(first)
        basket = np.cumsum(starts) - 1
        owner = events.owner[starts]
        weight = self._basket_weights(np.bincount(owner, minlength=len(user)))
        # An item counts once per basket, whatever the number of its events there.
        num_items = self._log.num_items
        distinct = np.unique(basket * num_items + events.item)
        basket, item = np.divmod(distinct, num_items)
        cell, inverse = np.unique(owner[basket] * num_items + item, return_inverse=True)
        value = np.bincount(inverse, weight[basket], len(cell)).astype(np.float64, copy=False)
        row, item = np.divmod(cell, num_items)
        return SparseRows(np.searchsorted(row, np.arange(len(user) + 1)), item, value, num_items)

    def _basket_weights(self, num_baskets: Int) -> Floats:
        """Weight of every basket of users [n] with so many baskets: float64 [sum]."""
        groups = np.minimum(num_baskets, self._num_groups)
        index = ranges(0, num_baskets)
        count, num_groups = np.repeat(num_baskets, num_baskets), np.repeat(groups, num_baskets)
        size = count // num_groups
        small = num_groups - count % num_groups  # the number of older groups, with `size` baskets each
        in_small = index < small * size
        group = np.where(in_small, index // size, small + (index - small * size) // (size + 1))
        place = np.where(in_small, index % size, (index - small * size) % (size + 1))
        size = np.where(in_small, size, size + 1)
        within = np.power(self._within_decay, size - 1 - place) / size
        weight: Floats = within * np.power(self._group_decay, num_groups - 1 - group) / num_groups
        return weight
