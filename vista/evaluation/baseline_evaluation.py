"""Counting baselines on the cases of a model: the same users, questions, and items to choose from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from vista.arrays import Float32s, Floats, Int
from vista.config import DataConfig, EvaluateConfig
from vista.config.checks import AskedBaselines, Split, Target
from vista.errors import ConfigError
from vista.evaluation.cases import (
    EarlierEvents,
    ImpressionCases,
    impression_cases,
    questions_by_user,
    with_tasks,
)
from vista.evaluation.comparison import PerUserMetrics, mean_cell, per_user_path
from vista.evaluation.counting_baselines import (
    CountingBaseline,
    Ease,
    TifuKnn,
    Tuned,
    counting_baselines,
    scores_in_columns,
)
from vista.evaluation.protocol import measure_next_items, measure_windows, window_lengths, window_metric
from vista.evaluation.trained_baselines import (
    CounterTrees,
    NewItemTrees,
    PooledFactors,
    PooledItemVectors,
    factor_vectors,
)
from vista.examples.item_statistics import item_counts
from vista.log.event_log import EventLog
from vista.log.splits import leaves_out_seen, split_until, visible_counts
from vista.logistic_regression import fit_probability, predict_probability
from vista.model.ranking_model import RankingModel
from vista.progress_bar import elapsed_time, progress_bar, ticking
from vista.text_table import text_table


@dataclass(frozen=True, slots=True)
class BaselineReport:
    """Metrics of each user, by baseline."""

    per_user: dict[str, PerUserMetrics]
    tables: dict[str, dict[str, str]]
    """What is printed: {"next 50 events": {"precision@10": "precision@10/50-events", …}, …}, names by column."""

    def metrics(self) -> dict[str, dict[str, float]]:
        """Means over users, by baseline and metric."""
        return {name: own.means() for name, own in self.per_user.items()}

    def ahead_of(self, model: Mapping[str, float]) -> list[str]:
        """The metrics in which the best baseline is ahead of a model: "hr@10 0.1200 (own frequency: 0.1300)"."""
        measured, found = self.metrics(), []
        for name in dict.fromkeys(name for metrics in measured.values() for name in metrics):
            best = max(measured, key=lambda baseline: measured[baseline].get(name, -math.inf))
            value, bar = model.get(name, math.nan), measured[best][name]
            if value < bar:  # not if one is undefined
                found.append(f"{name} {value:.4f} ({best}: {bar:.4f})")
        return found

    def save(self, out: str) -> None:
        """Write the metrics of each user where `vista compare` finds them under the name <out>.<baseline>."""
        for name, own in self.per_user.items():
            own.save(per_user_path(f"{out}.{name.replace(',', '').replace(' ', '-')}"))

    def __str__(self) -> str:
        tables = []
        for title, columns in self.tables.items():
            header = [f"baselines, {title}", *columns]
            rows = [
                [baseline, *(mean_cell(own.values[name]) for name in columns.values())]
                for baseline, own in self.per_user.items()
            ]
            tables.append(text_table(header, rows))
        return "\n".join(tables)


LEARNED = (Tuned, PooledFactors, CounterTrees, NewItemTrees)
"""Baselines that are fitted to the length of the windows that are asked."""
RIDGES = (1000.0, 200.0, 5000.0)
OWN_WEIGHTS = (0.3, 0.7, 0.9)
GROUP_DECAYS = (0.7, 0.9)
TEMPERATURES_AND_RATES = ((0.1, 0.001), (0.1, 0.003), (0.2, 0.003))


def trained_baselines(*, horizon_events: int, at_one_time: bool) -> list[CountingBaseline]:
    """Baselines that take a minute or more for a million events.

    Args:
        horizon_events: number of next events whose items are predicted.
        at_one_time: whether all users are asked at one time (a split by time), or each after an event.

    Raises:
        MissingDependencyError: if scikit-learn is not installed.
    """
    decays_and_weights = [(decay, own) for decay in GROUP_DECAYS for own in OWN_WEIGHTS]
    return [
        Tuned(Ease(), RIDGES, horizon_events=horizon_events),
        Tuned(TifuKnn(), decays_and_weights, horizon_events=horizon_events),
        PooledFactors(horizon_events=horizon_events),
        Tuned(PooledItemVectors(horizon_events=horizon_events), TEMPERATURES_AND_RATES, horizon_events=horizon_events),
        CounterTrees(horizon_events=horizon_events, at_one_time=at_one_time),
        NewItemTrees(horizon_events=horizon_events, at_one_time=at_one_time),
    ]


def measure_baselines(model: RankingModel, log: EventLog, config: EvaluateConfig) -> BaselineReport:
    """Measure the counting baselines on the cases of a model, and with baselines=trained also those that learn.

    Raises:
        ConfigError: as `measure_baseline`.
        MissingDependencyError: scikit-learn is not installed, and trained baselines are asked for.
    """
    is_window = config.target is Target.window
    returns = is_window or not leaves_out_seen(log, model.data)
    columns = model.rows_of(log.items) - 1
    horizons = asked_horizons(config)
    known = {"has_time": log.has_time, "returns": returns, "has_features": bool(log.item_features)}
    by_horizon = [counting_baselines(horizon_events=n, **known) for n in horizons]
    if config.baselines is AskedBaselines.trained:
        at_one_time = model.data.split is Split.time
        trained = [trained_baselines(horizon_events=n, at_one_time=at_one_time) for n in horizons]
        by_horizon = [[*counting, *learned] for counting, learned in zip(by_horizon, trained, strict=True)]
    measured = {}
    asked = list(zip(*by_horizon, strict=True))
    with progress_bar(total=len(asked), desc="baselines", unit="baseline") as bar, ticking(bar):
        for versions in asked:
            name = versions[0].name
            bar.set_postfix_str(name, refresh=False)  # shown while it is fitted, which can take minutes
            by_length = dict(zip(horizons, versions, strict=True))
            measured[name] = measure_by_horizon(by_length, log, model.data, config, columns)
            bar.update()
    tables = {"next item": {name: name for name in measured[versions[0].name].values}}
    if is_window:  # too many to print all
        k = config.top_k[0]
        heads = [f"precision@{k}", f"precision@{k}:returns", *(f"recall@{k}:new" for k in config.top_k)]
        values = measured[versions[0].name].values
        heads += [
            head for head in (f"recall@{k}:cold" for k in config.top_k) if any(n.startswith(head) for n in values)
        ]
        tables = {
            f"next {window}": {head: window_metric(head, window) for head in heads} for window in window_lengths(config)
        }
    return BaselineReport(measured, tables)


def asked_horizons(config: EvaluateConfig) -> list[int]:
    """Numbers of next events that a baseline is made for. One that is asked about days predicts the first number."""
    if config.target is Target.next:
        return [1]
    return config.horizon_events[:1] if config.horizon_days else config.horizon_events


def measure_by_horizon(
    versions: Mapping[int, CountingBaseline], log: EventLog, data: DataConfig, config: EvaluateConfig, columns: Int
) -> PerUserMetrics:
    """`measure_baseline`, where each window is answered by the version of the baseline that was made for its length.

    Args:
        versions: {number of next events: baseline}, for all of `asked_horizons`.
        data, config, columns: as in `measure_baseline`.

    Raises:
        ConfigError: as `measure_baseline`.
    """
    first, *others = versions
    measured = measure_baseline(versions[first], log, data, config, columns)
    values = measured.values
    for horizon in others if isinstance(versions[first], LEARNED) else ():
        own = measure_baseline(versions[horizon], log, data, config, columns).values
        values = values | {name: own[name] for name in values if name.endswith(window_metric("", f"{horizon} events"))}
    return replace(measured, values=values)


def measure_baseline(
    baseline: CountingBaseline, log: EventLog, data: DataConfig, config: EvaluateConfig, columns: Int
) -> PerUserMetrics:
    """Fit a baseline to the events before the labels of a part of a split, and measure it as a model.

    Args:
        data: the split, and whether to leave out seen items.
        config: what to ask, and the metrics; what it says about files is not read.
        columns: int64 [log.num_items], the column of each of the log's items among the items to choose from; -1 for
            items that are not among them.

    Raises:
        ConfigError: as `measure_windows`, or if the part has no label.
    """
    baseline.fit(log, visible_counts(log, split_until(data, config.split)), np.random.default_rng(0))
    score = partial(scores_in_columns, baseline, columns)
    if config.target is Target.window:
        _, per_user = measure_windows(log, data, columns, config, score)
    else:
        _, per_user = measure_next_items(log, data, columns, config, score)
    if not len(per_user.users):
        raise ConfigError(f"{log.path} has no {config.split} label to rank; choose another split")
    return per_user


# Baselines for labels of impressions, fitted to the labels before a cut: item rates, counters, and pooled vectors.
#
# They need no training of a model: a logistic regression on some features of the user's history and the candidate.
# Letters: N impressions, R features, V items, M columns of item vectors, T events.

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
