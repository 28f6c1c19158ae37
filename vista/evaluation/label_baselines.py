"""Baselines for labels of impressions, fitted to the labels before a cut: rates, counters, and pooled vectors.

They need no training of a model, only a logistic regression or boosted trees on some features of what the user did and
of the candidate. Rates and sums are of the labels that were known at the question, so that labels are predicted from
earlier ones alone, in fitting too; item vectors are made from the first half of the labels, and read by trees that are
fitted to the second half (cross-fitting in time).

Letters: N impressions, T known labels, R features, V items, M columns of item vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Floats, Int
from vista.config import DataConfig
from vista.evaluation.cases import EarlierEvents, ImpressionCases, impression_cases, questions_by_user, with_tasks
from vista.evaluation.trained_baselines import factor_vectors, grown_trees
from vista.examples.item_statistics import item_counts
from vista.log.event_log import EventLog
from vista.log.splits import split_until, visible_counts
from vista.logistic_regression import fit_probability, predict_probability
from vista.progress_bar import elapsed_time

MAX_FITTED = 50_000
"""Most impressions to which a logistic regression is fitted; more are sampled."""
MAX_GROWN = 250_000
"""Most impressions to which trees are fitted; more are sampled."""
LAST = (32, 200)
"""Numbers of newest events or labels whose counts and sums are features, next to those of all."""
RATES, LABEL_TREES, POOLED_LABELS = "item and user rates", "label trees", "pooled label vectors"
"""Names of the baselines that read earlier labels."""
_DIM = 64
_FACTORS = 32
_NEVER_MS = 1e15
"""Age of the newest label where there is none."""
_ITEM_PRIOR, _PRIOR = 20, 5
"""Impressions with the mean rate that are added to those of each item, and to those of each user, or pair of a user and
an item or category."""
_TREES = {"max_iter": 300, "learning_rate": 0.06, "max_leaf_nodes": 31, "min_samples_leaf": 100}
_TREES |= {"early_stopping": False, "random_state": 0}


def label_baselines(log: EventLog, data: DataConfig, cases: ImpressionCases, *, trained: bool) -> dict[str, Float32s]:
    """Probabilities float32 [N, tasks] of each baseline, by name; none if no impression precedes the held-out labels.

    - item rate: the share of the item's impressions before the cut that have the label.
    - counters: how often and how long ago the user had the item.
    - pooled vectors: cosines of the item's vector and the means of the user's last 32, last 200, and all items.

    Counters and pooled vectors also read the item rate and the item's popularity. With `trained` also:

    - item and user rates: a logistic regression on both, of all and of the user's last 32 labels.
    - label trees: boosted trees on the counters, and on numbers and rates of the earlier labels of the item, of the
      user, and of the user with the item and with each of its categories.
    - pooled label vectors: the same trees, which also read products of the item's vector and the sums of the vectors of
      the user's items, weighted by residuals of their labels.

    Args:
        data: the split; everything is fitted to what is visible to its training. Of events, active ones are read.
        cases: the questions, which may have fewer tasks than the log.

    Raises:
        MissingDependencyError: if scikit-learn is not installed, and `trained` is asked for.
    """
    limit = split_until(data, "train")
    table = log.impressions
    if table is None or limit.before is None or not table.num_impressions:
        return {}
    log, cases = log.active, replace(cases, seen=log.active_counts(cases.seen, cases.user))
    begin = int(np.asarray(table.timestamp).min())
    fitted = with_tasks(impression_cases(log, begin, limit.before, max_cases=MAX_FITTED), cases.tasks)
    if not fitted.mask.any():
        return {}
    counts = visible_counts(log, limit)
    popularity = np.log1p(item_counts(log, counts))
    with elapsed_time("item factors"):
        vectors = factor_vectors(log, counts, _DIM, seed=0)
    readers: dict[str, Callable[[ImpressionCases], Floats]] = {
        "counters": lambda asked: _counters(log, asked),
        "pooled vectors": lambda asked: _cosines(log, vectors, asked),
    }
    rates = [_ItemRate.of(fitted, task, log.num_items) for task in range(len(cases.tasks))]
    out = {"item rate": np.stack([rate.probability[cases.item] for rate in rates], axis=1).astype(np.float32)}
    for name, read in readers.items():
        known, asked = (np.column_stack([read(each), popularity[each.item]]) for each in (fitted, cases))
        columns = []
        for task, rate in enumerate(rates):
            mask = fitted.mask[:, task]
            if not mask.any():  # the task has labels only after the cut
                columns.append(rate.probability[cases.item])
                continue
            own = rate.without_own(fitted.item[mask], fitted.label[mask, task])
            weights = fit_probability(_products(known[mask], own), fitted.label[mask, task])
            columns.append(predict_probability(_products(asked, rate.log_odds(cases.item)), weights))
        out[name] = np.stack(columns, axis=1).astype(np.float32)
    if trained:
        learned = []
        for name, rate in zip(cases.tasks, rates, strict=True):
            features = LabelFeatures(log, data, name)
            without = dict.fromkeys((RATES, LABEL_TREES, POOLED_LABELS), rate.probability[cases.item])
            learned.append(_learned(features, cases) if features.can_learn else without)
        out |= {name: np.stack([each[name] for each in learned], axis=1).astype(np.float32) for name in learned[0]}
    return out


# Features of earlier labels.


@dataclass(frozen=True, slots=True)
class EarlierLabels:
    """Of N questions, the labels of a group (such as those of one user, or of one item) before each."""

    count: Int
    """int64 [N]."""
    total: Floats
    """float64 [N]: sum of the labels."""
    recent: dict[int, tuple[Int, Floats]]
    """{n: the same of the last n labels of the group}."""
    age: Floats
    """float64 [N]: ms since the newest one; infinite without one."""

    @classmethod
    def of(
        cls, group: Int, time: Int, label: Floats, asked_group: Int, asked_time: Int, last: tuple[int, ...] = ()
    ) -> EarlierLabels:
        """Count the labels with an earlier time than the question, in the question's group.

        Args:
            group, time, label: [T] of the known labels.
            asked_group, asked_time: [N] of the questions. A negative group has no labels.
            last: the numbers n of `recent`.
        """
        groups, group = np.unique(group, return_inverse=True)
        times, place = np.unique(time, return_inverse=True)
        order = np.lexsort((place, group))
        width = len(times) + 1
        key = group[order] * width + place[order]
        sums = np.concatenate([[0.0], np.cumsum(label[order])])
        found = np.minimum(np.searchsorted(groups, asked_group), len(groups) - 1)
        is_known = groups[found] == asked_group
        begin = np.searchsorted(key, found * width)
        end = np.where(is_known, np.searchsorted(key, found * width + np.searchsorted(times, asked_time)), begin)
        recent = {}
        for n in last:
            start = np.maximum(begin, end - n)
            recent[n] = end - start, sums[end] - sums[start]
        newest = times[place[order][np.maximum(end - 1, 0)]]
        age = np.where(end > begin, asked_time - newest, np.inf)
        return cls(end - begin, sums[end] - sums[begin], recent, age)

    def rate(self, mean: Floats | float, prior: float) -> Floats:
        """Share of labels of 1, drawn to `mean` where there are few: float64 [N]."""
        return (self.total + prior * mean) / (self.count + prior)

    def recent_rates(self, mean: float) -> list[Floats]:
        """The same of the newest ones, for each n of `recent`."""
        return [(total + _PRIOR * mean) / (count + _PRIOR) for count, total in self.recent.values()]

    def columns(self, mean: float) -> list[Floats]:
        """Features [N] each: log of the count, the rate, the rates of the newest ones, and log of the age."""
        age = np.log1p(np.minimum(self.age, _NEVER_MS))
        return [np.log1p(self.count), self.rate(mean, _PRIOR), *self.recent_rates(mean), age]


@dataclass(frozen=True, slots=True)
class _Labels:
    """The labels of a task in the whole log, and those before a cut that statistics of all users may read."""

    user: Int
    """int64 [T] rows of the log, ascending."""
    item: Int
    """int64 [T] rows of the log."""
    time: Int
    """int64 [T] ms when each became known, ascending per user."""
    label: Floats
    """float64 [T]."""
    delay: int
    """ms from the impression to `time`."""
    cut: int
    """Time in ms from which labels are held out."""
    mean: float
    """Share of labels of 1 before the cut."""

    @classmethod
    def of(cls, log: EventLog, task: str, cut: int) -> _Labels:
        table = log.impressions
        assert table is not None
        column = table.tasks.index(task)
        user = np.repeat(np.arange(log.num_users), np.diff(table.offsets))
        known = np.asarray(table.mask)[:, column].astype(np.bool_)
        delay = int(table.delay[column])
        time = np.asarray(table.timestamp)[known] + delay
        label = np.asarray(table.label)[known, column].astype(np.float64)
        before = label[time < cut]
        mean = (before.sum() + 1) / (len(before) + 2)
        return cls(user[known], np.asarray(table.item)[known].astype(np.int64), time, label, delay, cut, float(mean))

    def before(self, end: int) -> _Labels:
        """Those before a time."""
        own = self.time < end
        return replace(self, user=self.user[own], item=self.item[own], time=self.time[own], label=self.label[own])

    def of_group(
        self, of_known: Int, of_asked: Int, cases: ImpressionCases, last: tuple[int, ...] = ()
    ) -> EarlierLabels:
        """Labels of a group that belongs to one user: all before each question."""
        return EarlierLabels.of(of_known, self.time, self.label, of_asked, cases.timestamp, last)

    def of_all_users(self, of_known: Int, of_asked: Int, cases: ImpressionCases) -> EarlierLabels:
        """Labels of a group with several users: those before each question and before the cut."""
        time = np.minimum(cases.timestamp, self.cut)
        return EarlierLabels.of(of_known, self.time, self.label, of_asked, time)


def _single_categories(log: EventLog) -> list[Int]:
    """Codes int64 [V] of each category of which items have at most one value; 0 without a value."""
    found = []
    for column in log.item_features.values():
        if column.is_single and column.offsets is not None:
            code = np.zeros(log.num_items, np.int64)
            code[column.is_known] = 1 + column.data
            found.append(code)
    return found


# Boosted trees, and item vectors from residuals of labels.


class LabelFeatures:
    """What trees read, from the labels of a task in a log."""

    def __init__(self, log: EventLog, data: DataConfig, task: str) -> None:
        """
        Args:
            data: the split; statistics of all users are of what is visible to its training.
        """
        limit = split_until(data, "train")
        assert limit.before is not None
        self._whole, self._log, self.task, self.cut = log, log.active, task, limit.before
        self._popularity = np.log1p(item_counts(self._log, visible_counts(self._log, limit)))
        self.labels = _Labels.of(log, task, self.cut)
        earlier = self.labels.before(self.cut)
        self.can_learn = len(np.unique(earlier.label)) == 2
        """Whether there are labels of both kinds before the cut."""
        self.middle = int(np.median(earlier.time)) - earlier.delay if len(earlier.time) else self.cut
        """Time in ms of the first impressions whose labels are fitted to."""
        self._residuals = _Residuals.of(self._log, self.labels, self.middle) if self.can_learn else None

    def fitted(self) -> ImpressionCases:
        """The impressions to fit trees to, with a label each."""
        shown = impression_cases(self._whole, self.middle, self.cut, max_cases=MAX_GROWN)
        shown = with_tasks(shown, [self.task])
        return shown.part(np.flatnonzero(shown.mask[:, 0]))

    def rates(self, cases: ImpressionCases) -> Floats:
        """Log odds of the item, of the user, and of the user's last 32 labels, and their products: float64 [N, …]."""
        labels = self.labels
        item = labels.of_all_users(labels.item, cases.item, cases).rate(labels.mean, _ITEM_PRIOR)
        user = labels.of_group(labels.user, cases.user, cases, LAST[:1])
        rates = (item, user.rate(labels.mean, _PRIOR), *user.recent_rates(labels.mean))
        odds = [np.log(rate / (1 - rate)) for rate in rates]
        return _products(np.column_stack(odds[1:]), odds[0])

    def counters(self, cases: ImpressionCases) -> Floats:
        """Counts and rates of earlier labels and events, and the item's popularity: float64 [N, R]."""
        cases = replace(cases, seen=self._whole.active_counts(cases.seen, cases.user))
        labels, columns = self.labels, [*_counters(self._log, cases).T, self._popularity[cases.item]]
        for code in (np.arange(self._log.num_items), *_single_categories(self._log)):
            known, asked, size = code[labels.item], code[cases.item], int(code.max(initial=0)) + 1
            columns += labels.of_all_users(known, asked, cases).columns(labels.mean)[:2]
            pairs = labels.user * size + known, cases.user * size + asked
            columns += labels.of_group(*pairs, cases, LAST[:1]).columns(labels.mean)
        columns += labels.of_group(labels.user, cases.user, cases, LAST).columns(labels.mean)
        return np.column_stack(columns)

    def products(self, cases: ImpressionCases) -> Floats:
        """`_Residuals.products`: float64 [N, 3]."""
        assert self._residuals is not None
        return self._residuals.products(cases)


def label_trees(inputs: Floats, label: NDArray[np.floating]) -> Callable[[Floats], Floats]:
    """`grown_trees` with the settings of the baselines."""
    return grown_trees(inputs, label, **_TREES)


def _learned(features: LabelFeatures, cases: ImpressionCases) -> dict[str, Floats]:
    """Probabilities [N] of the baselines that read earlier labels, by name."""
    fitted = features.fitted()
    label = fitted.label[:, 0]
    weights = fit_probability(features.rates(fitted), label)
    out = {RATES: predict_probability(features.rates(cases), weights)}
    with elapsed_time("label counters"):
        known, asked = (features.counters(each) for each in (fitted, cases))
    with elapsed_time(LABEL_TREES):
        out[LABEL_TREES] = label_trees(known, label)(asked)
    known, asked = (np.column_stack([own, features.products(each)]) for own, each in ((known, fitted), (asked, cases)))
    with elapsed_time(POOLED_LABELS):
        out[POOLED_LABELS] = label_trees(known, label)(asked)
    return out


@dataclass(frozen=True, slots=True)
class _Residuals:
    """Item vectors that are factors of what item and user rates leave of labels, and the labels that are summed."""

    labels: _Labels
    residual: Floats
    """float64 [T]."""
    vectors: Floats
    """float64 [V, M]."""

    @classmethod
    def of(cls, log: EventLog, labels: _Labels, middle: int) -> _Residuals:
        """Vectors from the labels before the time `middle`."""
        import torch  # counting does not need it

        item = EarlierLabels.of(
            labels.item, labels.time, labels.label, labels.item, np.minimum(labels.time, labels.cut)
        )
        user = EarlierLabels.of(labels.user, labels.time, labels.label, labels.user, labels.time)
        expected = item.rate(labels.mean, _ITEM_PRIOR) + user.rate(labels.mean, _PRIOR) - labels.mean
        residual = labels.label - expected
        own = labels.time < middle
        index = np.stack([labels.user[own], labels.item[own]])
        count = np.bincount(labels.item[own], minlength=log.num_items)
        scale = 1 / np.sqrt(count + _ITEM_PRIOR)
        value = residual[own] * scale[labels.item[own]]
        shape = (log.num_users, log.num_items)
        matrix = torch.sparse_coo_tensor(
            torch.from_numpy(index), torch.from_numpy(value), shape, check_invariants=False
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            size = min(_FACTORS, *shape)
            _, _, right = torch.svd_lowrank(matrix.coalesce(), q=size, niter=4)
        return cls(labels, residual, right.numpy() * scale[:, None])

    def products(self, cases: ImpressionCases) -> Floats:
        """Products of the candidate's vector and sums over the user's newest and all earlier labels: float64 [N, 3]."""
        out = np.zeros((len(cases.user), 1 + len(LAST)))
        first = np.searchsorted(self.labels.user, np.arange(self.labels.user.max(initial=0) + 2))
        for row, chosen in questions_by_user(cases.user, "pooled labels"):
            if row + 1 >= len(first):
                continue
            own = slice(first[row], first[row + 1])
            weighted = self.vectors[self.labels.item[own]] * self.residual[own, None]
            sums = np.concatenate([np.zeros((1, weighted.shape[1])), np.cumsum(weighted, axis=0)])
            stop = np.searchsorted(self.labels.time[own], cases.timestamp[chosen])
            for column, last in enumerate([None, *LAST]):
                start = np.zeros_like(stop) if last is None else np.maximum(stop - last, 0)
                out[chosen, column] = np.einsum("nm,nm->n", sums[stop] - sums[start], self.vectors[cases.item[chosen]])
        return out


# Features of events.


@dataclass(frozen=True, slots=True)
class _ItemRate:
    """The rate of a task's labels per item, drawn to the mean rate where an item has few impressions."""

    true: Floats
    """float64 [V] labels of 1, with those of the prior."""
    shown: Floats
    """float64 [V] known labels, with those of the prior."""

    @classmethod
    def of(cls, cases: ImpressionCases, task: int, num_items: int) -> _ItemRate:
        mask = cases.mask[:, task]
        label = cases.label[mask, task].astype(np.float64)
        mean = (label.sum() + 1) / (len(label) + 2)
        shown = (np.bincount(cases.item[mask], minlength=num_items) + _PRIOR).astype(np.float64)
        true = np.bincount(cases.item[mask], label, num_items) + _PRIOR * mean
        return cls(true.astype(np.float64), shown)

    @property
    def probability(self) -> Floats:
        return self.true / self.shown

    def log_odds(self, item: Int) -> Floats:
        """float64 [N] of items [N]."""
        odds: Floats = np.log(self.true[item] / (self.shown - self.true)[item])
        return odds

    def without_own(self, item: Int, label: Float32s) -> Floats:
        """`log_odds` of the impressions that the rates were counted from, each without its own label."""
        true, shown = self.true[item] - label, self.shown[item] - 1
        odds: Floats = np.log(true / (shown - true))
        return odds


def _products(raw: Floats, rate: Floats) -> Floats:
    """A constant, the features [N, R] and the rate [N], and the products of each two: float64 [N, …]."""
    columns = np.column_stack([np.ones(len(raw)), raw, rate])
    left, right = np.triu_indices(columns.shape[1])
    products: Floats = columns[:, left] * columns[:, right]
    return products


def _counters(log: EventLog, cases: ImpressionCases) -> Floats:
    """Counts of the candidate among the user's events, and the age of the newest one: float64 [N, 4]."""
    own = EarlierEvents.of(log, np.arange(log.num_items), cases.user, cases.seen, cases.item, LAST)
    age = np.where(own.newest_age < 0, cases.seen, own.newest_age)
    features: Floats = np.log1p(np.column_stack([own.count, *own.recent.values(), age]))
    return features


def _cosines(log: EventLog, vectors: Floats, cases: ImpressionCases) -> Floats:
    """Cosines of the candidate and the means of the user's newest and of all events: float64 [N, 3]."""
    out = np.zeros((len(cases.user), 1 + len(LAST)))
    for row, chosen in questions_by_user(cases.user, "pooled vectors"):
        events = vectors[np.asarray(log.slice(row, 0, int(cases.seen[chosen].max())).item)]
        sums = np.concatenate([np.zeros((1, events.shape[1])), np.cumsum(events, axis=0)])
        seen = cases.seen[chosen]
        for column, last in enumerate([None, *LAST]):
            start = np.zeros_like(seen) if last is None else np.maximum(seen - last, 0)
            total = sums[seen] - sums[start]
            length = np.linalg.norm(total, axis=1)
            dots = np.einsum("nm,nm->n", total, vectors[cases.item[chosen]])
            out[chosen, column] = dots / np.where(length > 0, length, 1)
    return out
