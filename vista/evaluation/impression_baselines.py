"""Baselines for labels of impressions, fitted to the labels before a cut: item rates, counters, and pooled vectors.

They need no training of a model: a logistic regression on some features of the user's history and the candidate.
Letters: N impressions, R features, V items, M columns of item vectors, T events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vista.arrays import Float32s, Floats, Int
from vista.config import DataConfig
from vista.evaluation.baselines.pooled_means import factor_vectors
from vista.evaluation.cases import ImpressionCases, impression_cases, with_tasks
from vista.evaluation.earlier_events import EarlierEvents, questions_by_user
from vista.examples.frequency import item_counts
from vista.log.event_log import EventLog
from vista.log.splits import split_until, visible_counts
from vista.logistic_regression import fit_probability, predict_probability
from vista.progress_bar import elapsed_time

MAX_FITTED = 50_000
"""Most impressions to which they are fitted; more are sampled."""
LAST = (32, 200)
"""Numbers of newest events whose counts and means are features, next to those of all events."""
_DIM = 64
_PRIOR = 20
"""Impressions with the mean rate that are added to those of each item."""


def impression_baselines(log: EventLog, data: DataConfig, cases: ImpressionCases) -> dict[str, Float32s]:
    """Probabilities float32 [N, tasks] of each baseline, by name; none if no impression precedes the held-out labels.

    - item rate: the share of the item's impressions before the cut that have the label.
    - counters: how often and how long ago the user had the item.
    - pooled vectors: cosines of the item's vector and the means of the user's last 32, last 200, and all items.

    Counters and pooled vectors also read the item rate and the item's popularity.

    Args:
        data: the split; everything is fitted to what is visible to its training.
        cases: the questions, which may have fewer tasks than the log.
    """
    limit = split_until(data, "train")
    table = log.impressions
    if table is None or limit.before is None or not table.num_impressions:
        return {}
    begin = int(np.asarray(table.timestamp).min())
    fitted = with_tasks(impression_cases(log, begin, limit.before, max_cases=MAX_FITTED), cases.tasks)
    if not len(fitted.user):
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
    return out


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
