"""Questions in the training part, for baselines that learn: each has its whole window of answers before the cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vista.arrays import Floats, Int
from vista.evaluation.cases import WindowCases, distinct_items, window_cases
from vista.evaluation.counting_baselines import Ease, ItemNeighbors, OwnFrequency, tie_breaker
from vista.examples.batch_source import NegativeSampler
from vista.examples.item_statistics import item_counts, item_factors
from vista.installation import require_module
from vista.log.event_log import EventLog
from vista.log.histories import DAY_MS, Histories, ranges
from vista.logistic_regression import fit_probability
from vista.model.losses import window_loss

MIN_SEEN = 50
"""Users with fewer events before a question are not asked."""
SHARES = (0.7, 0.8, 0.9)
"""Shares of the visible events that come before the questions."""


def training_questions(
    log: EventLog, counts: Int, horizon_events: int, *, at_one_time: bool
) -> list[tuple[Int, WindowCases]]:
    """The events before a question, int64 [num_users] of all users, and its cases: one question per share of SHARES.

    Users whose next `horizon_events` events pass the cut are not asked.

    Args:
        counts: int64 [num_users] visible events.
        at_one_time: ask all users at the time when this share of all visible events has occurred; otherwise ask each
            user after this share of their own events.
    """
    time = log.gather(np.arange(log.num_users), counts, features=False).timestamp if at_one_time else None
    questions = []
    for share in SHARES:
        if time is None:
            before, now = (share * counts).astype(np.int64), None
        else:
            now = int(np.quantile(time, share)) if len(time) else 0
            before = np.minimum(log.counts_before(now), counts)
        cases = window_cases(
            log, before, counts, horizon_events=horizon_events, now=now, min_seen=MIN_SEEN, min_after=horizon_events
        )
        questions.append((before, cases))
    return questions


# Labels of boosted trees.


def in_windows(cases: WindowCases, row: Int, item: Int, num_items: int) -> NDArray[np.bool_]:
    """Whether items are in the windows of cases. `row`: int64 places in `cases`; item: int64 rows of the log. The two
    broadcast."""
    label = np.repeat(np.arange(len(cases)), np.diff(cases.offsets)) * num_items + cases.item
    return np.isin(row * num_items + item, label)


# Counters of every item that a user had: what trees learn from.
#
# Letters: n users, E pairs of a user and an item that the user had, F features.

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


_USERS_PER_BLOCK = 256
ROWS_FOR_THREADS = 1 << 19
"""Rows from which several threads fit boosted trees. OpenMP's idle threads sleep (`vista.threads`), and waking them for
thousands of small steps takes longer than these: two threads took 6 times as long as one with 37,000 rows, and as long
with 600,000."""


def grown_trees(inputs: Floats, label: NDArray[np.generic], **settings: Any) -> Callable[[Floats], Floats]:
    """Fit boosted trees to labels [N] of inputs [N, R]; returns what predicts probabilities. Raises
    MissingDependencyError if scikit-learn is not installed. `settings`: of its HistGradientBoostingClassifier."""
    trees = require_module("sklearn.ensemble", "baselines").HistGradientBoostingClassifier(**settings)
    limits = require_module("threadpoolctl", "baselines").threadpool_limits
    with limits(1 if len(label) < ROWS_FOR_THREADS else None, user_api="openmp"):
        trees.fit(inputs, label)
    return lambda asked: trees.predict_proba(asked)[:, 1]


class _WindowTrees:
    """Boosted trees that learn whether an item occurs in the next events."""

    name: str

    def __init__(self, *, horizon_events: int, at_one_time: bool) -> None:
        """
        Args:
            horizon_events: number of next events in which an item may occur.
            at_one_time: whether all users are asked at one time (as in a split by time), or each after an event.

        Raises:
            MissingDependencyError: if scikit-learn is not installed.
        """
        require_module("sklearn.ensemble", "baselines")
        self._horizon, self._at_one_time = horizon_events, at_one_time

    def _grow(
        self, inputs: list[Floats], labels: list[NDArray[np.bool_]], rng: np.random.Generator, **settings: Any
    ) -> None:
        """Fit `_trees` to all inputs; None if their labels are all equal."""
        label = np.concatenate([np.zeros(0, np.bool_), *labels])
        self._trees: Callable[[Floats], Floats] | None = None
        if label.any() and not label.all():
            settings["random_state"] = int(rng.integers(1 << 31))
            self._trees = grown_trees(np.concatenate(inputs), label, **settings)


class CounterTrees(_WindowTrees):
    """Probability that an item of the history occurs in the next events, by scikit-learn's HistGradientBoosting. Other
    items rank below, by popularity."""

    name = "counter trees"

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log = log
        self._popularity = item_counts(log, counts)
        self._tie = tie_breaker(self._popularity)
        inputs, labels = [], []
        for before, cases in training_questions(log, counts, self._horizon, at_one_time=self._at_one_time):
            popularity = item_counts(log, before)
            for begin in range(0, len(cases), _USERS_PER_BLOCK):
                part = cases.part(slice(begin, begin + _USERS_PER_BLOCK))
                features = counter_features(log, part.user, part.seen, part.now, popularity)
                inputs.append(features.value)
                labels.append(in_windows(part, features.row, features.item, log.num_items))
        self._grow(inputs, labels, rng, max_iter=120, learning_rate=0.08)

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        out = np.tile(self._tie, (len(user), 1))
        features = counter_features(self._log, user, seen, now, self._popularity)
        if self._trees is not None and len(features.row):
            out[features.row, features.item] += self._trees(features.value)
        return out


# Means of item vectors over histories, and item vectors without training.
#
# Letters: n users, T events, M columns of the vectors, K means, V items.

_DECAY = 200
NUM_MEANS = len(_LAST) + 2
ALL_EVENTS = len(_LAST)
"""Place of the mean over all events."""


def mean_weights(age: Int) -> Floats:
    """float64 [K, T]: the weights of events with `age` int64 [T] newer ones. The means are over the last 32, the last
    200, and all events, and the last one decays by the factor e over 200 events."""
    return np.stack([*(age < last for last in _LAST), np.ones(len(age)), np.exp(-age / _DECAY)])


def pooled_means(log: EventLog, vectors: Floats, user: Int, seen: Int) -> Floats:
    """Means of `vectors` float64 [V, M] over the first `seen` events of users [n]: float64 [K, n, M] of length 1. Users
    without events have 0."""
    events = log.gather(user, seen, features=False)
    weights = mean_weights(events.age)
    means = np.empty((len(weights), len(user), vectors.shape[1]))
    for row, (begin, end) in enumerate(pairwise(events.offsets.tolist())):
        means[:, row] = weights[:, begin:end] @ vectors[events.item[begin:end]]
    return _unit(means)


def factor_vectors(log: EventLog, counts: Int, dim: int, seed: int) -> Floats:
    """`item_factors` of all items from their first `counts` events: float64 [V, dim] of length 1. Items without factors
    have 0."""
    rows, factors = item_factors(log, np.arange(log.num_items) + 1, counts, dim, seed=seed)
    vectors = np.zeros((log.num_items, dim))
    vectors[rows - 1] = _unit(factors.astype(np.float64))
    return vectors


def _unit(vectors: Floats) -> Floats:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


# What trees learn from about items that are new to a user.
#
# Letters: n users, C candidates per user, F features, V items.

_CANDIDATES = 2000
"""Most items per user: the new ones with the largest score of item neighbors."""
_DIM = 64
_RECENT_DAYS = 30
_DECIMALS = 9


@dataclass(frozen=True, slots=True)
class Candidates:
    """Items that may be the user's next new ones, the best by item neighbors first."""

    item: Int
    """int64 [n, C] rows of the log, distinct per user."""
    is_new: NDArray[np.bool_]
    """bool [n, C]: the user did not have the item. A user who had almost all items has some that are not new."""
    value: Floats
    """float64 [n, C, F]: log(1 + x) of the place among the candidates, the length of the history, and the popularity;
    scores of item neighbors and EASE; cosines with the means of item factors over the last 32, the last 200, and all
    events. In a log with times also log(1 + x) of the item's events in the last 30 days."""


class NewItemFeatures:
    """Features from the first `counts` events of each user of a log."""

    def __init__(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log = log
        self._neighbors, self._ease = ItemNeighbors(), Ease()
        self._neighbors.fit(log, counts, rng)
        self._ease.fit(log, counts, rng)
        self._vectors = factor_vectors(log, counts, _DIM, int(rng.integers(1 << 31)))
        self._popularity = np.log1p(item_counts(log, counts))
        self._recent = _RecentEvents(log, counts) if log.has_time else None

    def candidates(self, user: Int, seen: Int, now: Int | None) -> Candidates:
        """The candidates of users [n] after their first `seen` events, at the times `now` (see `CountingBaseline`)."""
        had = had_items(self._log, user, seen)
        neighbors = self._neighbors.scores(user, seen, now)
        item = np.argsort(-np.where(had, -np.inf, neighbors), axis=1, kind="stable")[:, :_CANDIDATES]
        means = pooled_means(self._log, self._vectors, user, seen)[:3]
        dense = [neighbors, self._ease.scores(user, seen, now), *(mean @ self._vectors.T for mean in means)]
        logs = [np.arange(item.shape[1]), seen[:, None]]
        columns = [np.broadcast_to(np.log1p(each), item.shape) for each in logs]
        columns += [self._popularity[item], *(np.take_along_axis(each, item, axis=1) for each in dense)]
        if self._recent is not None:
            time = self._recent.newest(user, seen) if now is None else now
            columns.append(np.log1p(self._recent.count(item, time)))
        # Products depend on the batch in their last digits, which must not move a value across a tree's threshold.
        value = np.round(np.stack(columns, axis=2), _DECIMALS)
        return Candidates(item, ~np.take_along_axis(had, item, axis=1), value)


class _RecentEvents:
    """Counts the events of an item in the 30 days up to a time, over all users."""

    def __init__(self, log: EventLog, counts: Int) -> None:
        events = log.gather(np.arange(log.num_users), counts, features=False)
        self._log = log
        self._latest = int(events.timestamp.max(initial=0))
        self._origin = int(events.timestamp.min(initial=self._latest))
        self._span = self._latest - self._origin + 1
        self._keys = np.sort(events.item.astype(np.int64) * self._span + events.timestamp - self._origin)

    def newest(self, user: Int, seen: Int) -> Int:
        """int64 [n]: the times of each user's newest event (ms); of the newest of all for users without one."""
        newest = self._log.gather_ranges(user, seen - 1, seen)
        out = np.full(len(user), self._latest)
        out[newest.owner] = newest.timestamp
        return out

    def count(self, item: Int, time: Int) -> Int:
        """int64 [n, C] for items [n, C] and times [n]."""

        def before(end: Int) -> Int:
            return np.searchsorted(self._keys, item * self._span + np.clip(end - self._origin, 0, self._span)[:, None])

        return before(time + 1) - before(time + 1 - _RECENT_DAYS * DAY_MS)


def had_items(log: EventLog, user: Int, seen: Int) -> NDArray[np.bool_]:
    """bool [n, V]: the items of the first `seen` events of users [n]."""
    events = log.gather(user, seen, features=False)
    had = np.zeros((len(user), log.num_items), np.bool_)
    had[events.owner, events.item] = True
    return had


_NEGATIVES = 500
"""Expected number of candidates per user in training that are drawn among those that do not come next."""
_USERS_PER_NEW_ITEM_BLOCK = 64
_MOST_BLOCKS = 32
"""Random blocks of users that are asked each training question, if there are more."""
_TREES = {"max_iter": 100, "learning_rate": 0.05, "max_leaf_nodes": 8, "min_samples_leaf": 100, "early_stopping": False}
"""Small trees: logs have few users with new items in a whole window before the cut."""


class NewItemTrees(_WindowTrees):
    """Score that grows with the probability that a new item occurs in the next events, by HistGradientBoosting.

    It is the probability in training (scikit-learn), where few of the candidates that do not occur are drawn. Only the
    candidates of `NewItemFeatures` have one. Other new items rank below them, by popularity. Items of the
    history rank above all new ones, by own frequency that decays over 200 events.
    """

    name = "new-item trees"

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log = log
        self._tie = tie_breaker(item_counts(log, counts))
        self._own = OwnFrequency(events=_DECAY)
        self._own.fit(log, counts, rng)
        inputs, labels = [], []
        for before, cases in training_questions(log, counts, self._horizon, at_one_time=self._at_one_time):
            if not len(cases):
                continue
            features = NewItemFeatures(log, before, rng)
            blocks = rng.permutation(np.arange(0, len(cases), _USERS_PER_NEW_ITEM_BLOCK))[:_MOST_BLOCKS]
            for begin in blocks.tolist():
                part = cases.part(slice(begin, begin + _USERS_PER_NEW_ITEM_BLOCK))
                found = features.candidates(part.user, part.seen, part.now)
                label = in_windows(part, np.arange(len(part))[:, None], found.item, log.num_items)
                drawn = rng.random(label.shape) < _NEGATIVES / label.shape[1]
                kept = found.is_new & (label | drawn)
                inputs.append(found.value[kept])
                labels.append(label[kept])
        self._grow(inputs, labels, rng, **_TREES)
        if self._trees is not None:
            self._features = NewItemFeatures(log, counts, rng)

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        out = np.tile(self._tie, (len(user), 1))
        if self._trees is not None:
            found = self._features.candidates(user, seen, now)
            row, place = found.is_new.nonzero()
            if len(row):
                out[row, found.item[row, place]] += self._trees(found.value[row, place])
        had = had_items(self._log, user, seen)
        return np.where(had, 1 + self._own.scores(user, seen, now), out)


# Pooled factors: means of fixed item vectors over the history, and a logistic regression of what comes next on them.
#
# Letters: n users, M columns of the vectors, K means, V items.

_POOLED_FACTOR_NEGATIVES = 300
"""Random items per user in the regression, drawn in proportion to 1 + popularity."""


class PooledFactors:
    """Score: Σ_k w_k cos(item, mean_k) + w log(1 + popularity).

    The vectors are a factorization of co-occurrences (`item_factors`); the means are those of `pooled_means`. The
    weights are those of a logistic regression of the items of a window before the cut, with vectors from the events
    before that window.
    """

    name = "pooled factors"

    def __init__(self, *, horizon_events: int, dim: int = 64) -> None:
        """
        Args:
            horizon_events: number of next events whose items are predicted.
            dim: number of columns of the vectors.
        """
        self._horizon, self._dim = horizon_events, dim
        self._weights: Floats = np.array([0.0, 0.0, 1.0, 0.0, 0.0])  # the mean of all, if no window can be asked

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log = log
        seed = int(rng.integers(1 << 31))
        questions = training_questions(log, counts, self._horizon, at_one_time=False)
        before, cases = max(questions, key=lambda question: len(question[1]))
        if len(cases):
            self._read(before, seed)
            self._weights = self._fitted(cases, rng)
        self._read(counts, seed)

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        means = pooled_means(self._log, self._vectors, user, seen)  # [K, n, M]
        wanted = np.tensordot(self._weights[:-1], means, axes=1)
        out: Floats = wanted @ self._vectors.T + self._weights[-1] * self._popularity
        return out

    def _read(self, counts: Int, seed: int) -> None:
        """Set the vectors and the log popularity of all items from some visible events."""
        self._vectors = factor_vectors(self._log, counts, self._dim, seed)
        self._events = item_counts(self._log, counts)
        self._popularity = np.log1p(self._events)

    def _fitted(self, cases: WindowCases, rng: np.random.Generator) -> Floats:
        share = (1 + self._events) / (1 + self._events).sum()
        features, labels = [], []
        for begin in range(0, len(cases), _USERS_PER_BLOCK):
            part = cases.part(slice(begin, begin + _USERS_PER_BLOCK))
            means = pooled_means(self._log, self._vectors, part.user, part.seen)
            positive = np.repeat(np.arange(len(part)), np.diff(part.offsets))
            drawn = np.repeat(np.arange(len(part)), _POOLED_FACTOR_NEGATIVES)
            row = np.concatenate([positive, drawn])
            item = np.concatenate([part.item, rng.choice(self._log.num_items, len(drawn), p=share)])
            cosines = np.einsum("knm,nm->nk", means[:, row], self._vectors[item])
            features.append(np.column_stack([cosines, self._popularity[item], np.ones(len(row))]))
            labels.append(np.arange(len(row)) < len(positive))
        weights = fit_probability(np.concatenate(features), np.concatenate(labels).astype(np.float64))
        # Negatives are drawn in proportion to 1 + popularity, so the fitted weight of log popularity is 1 too low.
        weights[-2] += 1
        return weights[:-1]


# Pooled vectors: item vectors that learn, through their means over the history, what comes next.
#
# Letters: B questions of a step, n users, K means, M columns of the vectors, V items.

_SPACING = 16
"""Visible events per question."""
_MOST_QUESTIONS = 1 << 15
"""Most questions of a training: about 10 s of one core where histories have 800 events."""
_BATCH = 256
_POOLED_VECTOR_NEGATIVES = 1000
_POWER = 0.5
"""Negatives are drawn in proportion to the frequency ** _POWER."""


class PooledItemVectors:
    """Score: cos(item, Σ_k A_k mean_k) / temperature + w log(1 + popularity).

    The means are those of `pooled_means`, of the item vectors themselves, which start as a factorization of
    co-occurrences (`item_factors`). Vectors, A, and w minimize `window_loss`: a sampled softmax whose labels are the
    items of the next events after random visible events.
    """

    name = "pooled vectors"

    def __init__(
        self, *, horizon_events: int, dim: int = 64, temperature: float = 0.1, learning_rate: float = 0.001
    ) -> None:
        """
        Args:
            horizon_events: number of next events whose items are predicted.
            dim: number of columns of the vectors.
            temperature: divides the cosines.
            learning_rate: of Adam at the first step; it falls linearly to 0.
        """
        self._horizon, self._dim = horizon_events, dim
        self._temperature, self._learning_rate = temperature, learning_rate
        self._trained: tuple[Floats, Floats, float] | None = None
        """Vectors float64 [V, M] of length 1; maps float64 [K, M, M], with which a user's vector is the sum of
        mean_k @ maps[k], scaled to length 1; and the weight of the popularity."""

    def choose(self, value: tuple[float, float]) -> None:
        """Set the temperature and the learning rate."""
        (self._temperature, self._learning_rate), self._trained = value, None

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log, self._counts = log, counts
        self._seed = int(rng.integers(1 << 31))
        self._events = item_counts(log, counts)
        self._popularity = np.log1p(self._events)
        self._start, self._trained = factor_vectors(log, counts, self._dim, self._seed), None

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        if self._trained is None:
            self._trained = self._train()
        vectors, maps, popularity_weight = self._trained
        wanted = np.einsum("knm,kmj->nj", pooled_means(self._log, vectors, user, seen), maps)
        length = np.linalg.norm(wanted, axis=1, keepdims=True)
        wanted /= np.where(length > 0, length, 1) * self._temperature
        out: Floats = wanted @ vectors.T + popularity_weight * self._popularity
        return out

    def _train(self) -> tuple[Floats, Floats, float]:
        rng = np.random.default_rng(self._seed)
        # Items without factors start at random: a vector of 0 has no direction.
        has_factors = self._start.any(axis=1, keepdims=True)
        start = np.where(has_factors, self._start, rng.normal(0, self._dim**-0.5, self._start.shape))
        vectors = nn.Parameter(torch.from_numpy(start).float())
        maps = nn.Parameter(torch.eye(self._dim).repeat(NUM_MEANS, 1, 1) / NUM_MEANS)
        weight = nn.Parameter(torch.ones(1))
        user, seen = self._questions(rng)
        if len(user):
            popularity = torch.from_numpy(self._popularity).float().unsqueeze(1)
            sampler = NegativeSampler(self._events, num_negatives=_POOLED_VECTOR_NEGATIVES, power=_POWER)
            optimizer = torch.optim.Adam([vectors, maps, weight], lr=self._learning_rate)
            steps = -(-len(user) // _BATCH)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
            for step in range(steps):
                part = slice(step * _BATCH, (step + 1) * _BATCH)
                unit = F.normalize(vectors, dim=1)
                wanted = _wanted(unit, maps, self._log.gather(user[part], seen[part]))
                # One more column of both adds the popularity to the logits.
                wanted = torch.cat([wanted, (weight * self._temperature).expand(len(wanted), 1)], dim=1)
                after = self._log.gather_ranges(user[part], seen[part], seen[part] + self._horizon)
                negatives, log_weight = map(torch.from_numpy, sampler.draw(rng))
                items = torch.cat([unit, popularity], dim=1)
                label = _labels(after, len(items))
                loss = window_loss(wanted, items, label, negatives, log_weight, self._temperature)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
        unit = F.normalize(vectors.detach().double(), dim=1)
        return unit.numpy(), maps.detach().double().numpy(), float(weight.detach())

    def _questions(self, rng: np.random.Generator) -> tuple[Int, Int]:
        """Users and numbers of events before random questions whose windows end before the cut, int64 [Q] each."""
        places = np.maximum(self._counts - self._horizon, 0)
        end = np.cumsum(places)
        total = int(end[-1]) if len(end) else 0
        drawn = rng.integers(0, max(total, 1), min(-(-total // _SPACING), _MOST_QUESTIONS))
        user = np.searchsorted(end, drawn, side="right")
        return user, drawn - (end - places)[user] + 1


def _wanted(unit: Tensor, maps: Tensor, before: Histories) -> Tensor:
    """Vectors [B, M] of length 1 of the items that are wanted after the events `before`."""
    count = before.num_users
    weights = mean_weights(before.age)
    mean, event = weights.nonzero()
    row = mean * count + before.owner[event]
    index = torch.from_numpy(np.stack([row, before.item[event].astype(np.int64)]))
    value = torch.from_numpy(weights[mean, event]).float()
    size = (len(weights) * count, len(unit))
    sums = torch.sparse.mm(torch.sparse_coo_tensor(index, value, size, check_invariants=False), unit)
    means = F.normalize(sums.view(len(weights), count, -1), dim=2)
    return F.normalize(torch.bmm(means, maps).sum(0), dim=1)


def _labels(after: Histories, num_items: int) -> Tensor:
    """int64 [B, P]: the distinct items of each window; -1 pads."""
    owner, item = np.divmod(distinct_items(after, num_items), num_items)
    count = np.bincount(owner, minlength=after.num_users)
    labels = np.full((after.num_users, int(count.max())), -1)
    labels[owner, ranges(0, count)] = item
    return torch.from_numpy(labels)
