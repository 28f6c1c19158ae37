"""Baselines that count events: popularity, own frequency, transitions, and neighbors.

Letters: n users that are asked at once, V items of the log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from vista.arrays import Float32s, Floats, Int, offsets_of
from vista.evaluation.cases import NextItemCases, WindowCases, window_cases
from vista.evaluation.metrics import mean_and_error
from vista.evaluation.protocol import case_batches, rank_windows
from vista.examples.item_statistics import distinct_counts, item_counts, pair_counts
from vista.log.event_log import EventLog
from vista.log.features import Column
from vista.log.histories import DAY_MS, Histories, ranges
from vista.log.splits import visible_blocks
from vista.model.features import FeatureSpec
from vista.model.item_feature_table import value_codes


class CountingBaseline(Protocol):
    """Scores of all items of a log, from events before a cut."""

    name: str
    """Short name, as tables print it."""

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        """Count the visible events.

        Args:
            counts: int64 [num_users]; only the first counts[u] events of user u are read.
            rng: for all random choices.
        """

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        """Score all items for some users; a larger score ranks higher.

        Args:
            user: int64 [n] rows of the log.
            seen: int64 [n]; only the first seen[b] events of user[b] are read.
            now: int64 [n] times of the questions, ms; None asks right after each user's newest event.

        Returns:
            float64 [n, V], finite.
        """


# Popularity: an item's number of visible events.

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


# Sparse matrices, packed by rows: counted pairs of items, and vectors over items.
#
# Letters: R rows, C columns, E entries, V items.

MOST_EVENTS = 1 << 21
"""Events in which pairs within REACH events are counted: those of random users if there are more. It bounds the
memory: 3 GB if all pairs are distinct, and half of that in a catalog of 5,000 items."""


@dataclass(frozen=True, slots=True)
class SparseRows:
    """Row i has value[offsets[i] : offsets[i + 1]] at the same places of `column`."""

    offsets: Int
    """int64 [R + 1]."""
    column: Int
    """int64 [E], ascending in each row."""
    value: Floats
    """float64 [E]."""
    num_columns: int

    @property
    def row(self) -> Int:
        """int64 [E]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def dense(self) -> Floats:
        """float64 [R, C]."""
        out = np.zeros((len(self.offsets) - 1, self.num_columns))
        out[self.row, self.column] = self.value
        return out

    def cells(self, rows: NDArray[np.integer[Any]]) -> tuple[Int, Int]:
        """Places in `column` and `value` of some rows [n], concatenated, and the number of each row's entries [n]."""
        begin = self.offsets[rows]
        count = self.offsets[rows + 1] - begin
        return ranges(begin, count), count

    def weighted_sum(self, rows: NDArray[np.integer[Any]], weight: Floats) -> Floats:
        """Sum of rows [n] with weights [n]: float64 [C]."""
        place, count = self.cells(rows)
        values = self.value[place] * np.repeat(weight, count)
        total: Floats = np.bincount(self.column[place], values, self.num_columns).astype(np.float64, copy=False)
        return total


def transition_counts(log: EventLog, counts: Int) -> SparseRows:
    """How often item j came right after item i in the visible events of one history: row i, column j."""
    key, times = distinct_counts(_following_keys(block, log.num_items) for block in visible_blocks(log, counts))
    row, column = np.divmod(key, log.num_items)
    offsets = np.searchsorted(row, np.arange(log.num_items + 1))
    return SparseRows(offsets, column, times.astype(np.float64), log.num_items)


def co_occurrences(log: EventLog, counts: Int, rng: np.random.Generator) -> SparseRows:
    """How often two different items lie within REACH visible events of each other in one history; symmetric. `rng`:
    chooses users if the log has more than MOST_EVENTS visible events."""
    low, high, times = pair_counts(log, np.arange(log.num_items) + 1, counts, most_events=MOST_EVENTS, rng=rng)
    # In the order of its rows, each half has ascending columns, and those of the first half come first.
    row = np.concatenate([high, low])
    order = np.argsort(row, kind="stable")
    offsets = np.cumsum(np.bincount(row, minlength=log.num_items + 1))
    del row  # large
    column = np.concatenate([low, high])[order] - 1
    return SparseRows(offsets, column, np.concatenate([times, times])[order].astype(np.float64), log.num_items)


def _following_keys(histories: Histories, num_items: int) -> Int:
    """i * num_items + j of every transition."""
    item = histories.item.astype(np.int64)
    follows = np.flatnonzero(np.diff(histories.owner) == 0)
    return item[follows] * num_items + item[follows + 1]


# First-order transitions: what came right after the user's newest item, over all users.


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
    Items that have neither rank by popularity."""

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


class ItemNeighbors:
    """Sum over the user's events j of c_ij / sqrt(n_i n_j): c_ij pairs within REACH events, n_i events of item i. An
    item is not its own neighbor. Items that tie rank by popularity."""

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


_ITEMS_AT_ONCE = 1 << 14
"""Vectors that are held in float64 at once: float32 sums would differ between items that tie."""


class ContentNeighbors:
    """Sum over the user's events of the cosines between an item's features and those of the event's item.

    Each column of features has a cosine of its own, of the values that an item has, or of the bucket of its number,
    weighted by their inverse frequency among items, or of its vector. Items that tie rank by popularity.
    """

    name = "content neighbors"

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log = log
        if not log.item_features:
            raise ValueError(f"{log.path} has no features of items")
        self._tie = tie_breaker(item_counts(log, counts))
        self._values: list[SparseRows] = []
        self._vectors: list[Float32s] = []
        for name, column in log.item_features.items():
            if column.kind == "vector":
                self._vectors.append(_unit_vectors(column.data))
            else:
                self._values.append(_weighted_values(name, column))

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        events = self._log.gather(user, seen, features=False)
        out = np.tile(self._tie, (len(user), 1))
        profiles = [np.zeros((len(user), vectors.shape[1])) for vectors in self._vectors]
        for row, (begin, end) in enumerate(zip(events.offsets[:-1], events.offsets[1:], strict=True)):
            item, times = np.unique(events.item[begin:end], return_counts=True)
            weight = times.astype(np.float64)
            for values in self._values:
                profile = values.weighted_sum(item, weight)
                out[row] += np.bincount(values.row, values.value * profile[values.column], len(out[row]))
            for profile, vectors in zip(profiles, self._vectors, strict=True):
                profile[row] = weight @ vectors[item]
        for profile, vectors in zip(profiles, self._vectors, strict=True):
            for begin in range(0, len(vectors), _ITEMS_AT_ONCE):
                block = vectors[begin : begin + _ITEMS_AT_ONCE].astype(np.float64)
                out[:, begin : begin + len(block)] += profile @ block.T
        return out


def _unit_vectors(given: Float32s) -> Float32s:
    """Vectors of length 1, or 0 where one is missing: a single copy."""
    vectors: Float32s = np.nan_to_num(given, nan=0.0)
    largest = np.maximum(vectors.max(axis=1), -vectors.min(axis=1))
    vectors /= np.maximum(largest, np.finfo(np.float32).tiny)[:, None]  # Squares then neither overflow nor vanish.
    vectors /= np.maximum(np.sqrt(np.einsum("vd,vd->v", vectors, vectors)), 1e-12)[:, None]
    return vectors


def _weighted_values(name: str, column: Column) -> SparseRows:
    """Unit vectors of items over the values of a column."""
    spec = FeatureSpec.of(name, column)
    owner, code = value_codes(column, spec)
    num_items = len(column.is_known)
    items_of_value = np.bincount(code, minlength=spec.size)
    weight = np.log((1 + num_items) / (1 + items_of_value))[code]
    length = np.sqrt(np.bincount(owner, weight**2, num_items))
    offsets = offsets_of(np.bincount(owner, minlength=num_items))
    return SparseRows(offsets, code, weight / np.maximum(length[owner], 1e-12), spec.size)


# TIFU-KNN (Hu et al., SIGIR 2020, arXiv 2006.00556): personal item frequency with two decays, and nearest neighbors.
#
# Letters: n users that are asked at once, U users of the log, V items.

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


_USERS_PER_BLOCK = 1024


class Ease:
    """x B of the user's items x (0 or 1), with B_ij = -P_ij / P_jj, B_jj = 0, P = (Xᵀ X + ridge)⁻¹. All other items
    rank below, by popularity."""

    name = "EASE"

    def __init__(self, *, num_items: int = 5000, ridge: float = 1000.0) -> None:
        """
        Args:
            num_items: most items of the model; P needs the square of it in memory, and the cube in time.
            ridge: added to the diagonal of Xᵀ X.
        """
        self._num_items, self._ridge = num_items, ridge
        self._weights: Floats | None = None

    def choose(self, value: float) -> None:
        """Set the ridge."""
        self._ridge, self._weights = value, None

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log = log
        popularity = item_counts(log, counts)
        self._tie = tie_breaker(popularity)
        self._items = np.sort(np.argsort(-popularity, kind="stable")[: self._num_items])
        size = len(self._items)
        self._column = np.full(log.num_items, -1)
        self._column[self._items] = np.arange(size)
        self._gram, self._weights = np.zeros((size, size)), None
        for begin in range(0, log.num_users, _USERS_PER_BLOCK):
            users = np.arange(begin, min(begin + _USERS_PER_BLOCK, log.num_users))
            had = self._had(users, counts[users]).astype(np.float32)
            self._gram += had.T @ had

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        if self._weights is None:
            self._weights = self._solved()
        known = self._had(user, seen).astype(np.float64) @ self._weights
        out = np.tile(self._tie, (len(user), 1))
        out += known.min(axis=1, keepdims=True) - 1
        out[:, self._items] = known
        return out

    def _solved(self) -> Floats:
        """B."""
        regular = torch.from_numpy(self._gram + self._ridge * np.eye(len(self._gram)))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(regular)).numpy()
        weights: Floats = inverse / -np.diag(inverse)
        np.fill_diagonal(weights, 0)
        return weights

    def _had(self, user: Int, seen: Int) -> NDArray[np.bool_]:
        """bool [n, items of the model]: which of them each user had."""
        events = self._log.gather(user, seen, features=False)
        column = self._column[events.item]
        out = np.zeros((len(user), len(self._items)), np.bool_)
        out[events.owner[column >= 0], column[column >= 0]] = True
        return out


TuningValue = TypeVar("TuningValue", contravariant=True)


class TunableBaseline(CountingBaseline, Protocol[TuningValue]):
    """It counts once for all values: `fit` does not depend on the chosen one."""

    def choose(self, value: TuningValue) -> None:
        """Set the hyperparameter, before or after `fit`."""


MAX_USERS = 200
"""Most users whose last events are held out."""
MIN_SEEN = 50
"""A user needs so many events before the held-out ones, or one per event of the horizon if that is less."""
SHORT_EVENTS = 50
"""A window of up to so many events mostly tells what users do next, a longer one what they discover."""
_USERS_PER_BATCH = 128
Value = TypeVar("Value")


class Tuned(Generic[Value]):
    """A baseline with the best of several values for the last visible events, fitted to all visible events. The best
    value has the largest NDCG@10, or for horizons above SHORT_EVENTS the largest recall@50 of new items."""

    def __init__(self, baseline: TunableBaseline[Value], values: Sequence[Value], *, horizon_events: int) -> None:
        """
        Args:
            values: the first one is used if no user has enough events.
            horizon_events: number of events that are held out per user.
        """
        self.name = baseline.name
        self.chosen = values[0]
        """After `fit`, the best value."""
        self._baseline, self._values, self._horizon = baseline, values, horizon_events
        self._metric, self._k = ("ndcg@10", 10) if horizon_events <= SHORT_EVENTS else ("recall@50:new", 50)

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        min_seen = min(self._horizon, MIN_SEEN)
        asked = np.flatnonzero(counts >= min_seen + self._horizon)
        asked = rng.permutation(asked)[:MAX_USERS]
        held = counts.copy()
        held[asked] -= self._horizon
        cases = window_cases(
            log, held, counts, horizon_events=self._horizon, min_seen=min_seen, min_after=self._horizon
        )
        self.chosen = self._values[0]
        if len(cases):
            self._baseline.fit(log, held, rng)
            self.chosen = self._values[int(np.argmax([self._quality(value, log, cases) for value in self._values]))]
        self._baseline.choose(self.chosen)
        self._baseline.fit(log, counts, rng)

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        return self._baseline.scores(user, seen, now)

    def _quality(self, value: Value, log: EventLog, cases: WindowCases) -> float:
        self._baseline.choose(value)
        metrics = rank_windows(
            log,
            {"held out": cases},
            np.arange(log.num_items),
            lambda asked: self._baseline.scores(asked.user, asked.seen, asked.now),
            case_batches(cases, log.num_items, _USERS_PER_BATCH),
            [self._k],
        )
        return mean_and_error(metrics["held out"][self._metric])[0]


TRANSITION_WEIGHTS = (0.03, 0.3, 1.0, 3.0)


def counting_baselines(
    *, has_time: bool, horizon_events: int, returns: bool = True, has_features: bool = False
) -> list[CountingBaseline]:
    """Baselines that need no fit beyond counting: seconds for a million events, and at most 3 GB of memory.

    Args:
        has_time: whether the log has times.
        horizon_events: number of next events whose items are predicted; 1 for the next item.
        returns: whether items of the history are ranked. If not, those that count the user's own items are left out.
        has_features: whether the log has features of items, and their neighbors are asked for.
    """
    chosen: list[CountingBaseline] = [Popularity()]
    if returns:
        chosen += [OwnFrequency(), OwnFrequency(last=200), OwnFrequency(events=200)]
        chosen += [OwnFrequency(days=90)] if has_time else []
    chosen += [Transitions(), ItemNeighbors()]
    chosen += [ContentNeighbors()] if has_features else []
    chosen += [Tuned(TransitionsAndOwn(1.0), TRANSITION_WEIGHTS, horizon_events=horizon_events)] if returns else []
    return chosen


def fitted_scores(
    baseline: CountingBaseline, log: EventLog, counts: Int, columns: Int
) -> Callable[[NextItemCases | WindowCases], Floats]:
    """Fit a baseline to the first counts[u] events of every user u, and return what scores cases (`scores_in_columns`).

    Baselines read active events alone: what users saw and left would count as what they like.
    """
    baseline.fit(log.active, log.active_counts(counts), np.random.default_rng(0))

    def score(cases: NextItemCases | WindowCases) -> Floats:
        return scores_in_columns(baseline, columns, replace(cases, seen=log.active_counts(cases.seen, cases.user)))

    return score


def scores_in_columns(baseline: CountingBaseline, columns: Int, cases: NextItemCases | WindowCases) -> Floats:
    """Scores float64 [n, V] of a fitted baseline, at the times of the questions. `columns`: int64 [log.num_items], the
    column of each of the log's items; -1 for items without one. A column that no item of the log has scores -inf."""
    scores = baseline.scores(cases.user, cases.seen, cases.now)
    known = np.flatnonzero(columns >= 0)
    out = np.full((len(scores), columns.max(initial=0) + 1), -np.inf)
    out[:, columns[known]] = scores[:, known]
    return out
