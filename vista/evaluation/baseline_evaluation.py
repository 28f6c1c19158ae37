"""Baselines on the cases of a model: the same users, questions, items to choose from, and impressions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vista.arrays import Int
from vista.config import DataConfig, EvaluateConfig
from vista.config.checks import AskedBaselines, Split, Target
from vista.errors import ConfigError
from vista.evaluation.cases import ImpressionCases
from vista.evaluation.comparison import LEVEL, Estimate, PerUserMetrics, mean_cell, per_user_path
from vista.evaluation.counting_baselines import (
    CountingBaseline,
    Ease,
    TifuKnn,
    Tuned,
    counting_baselines,
    fitted_scores,
)
from vista.evaluation.label_baselines import label_baselines
from vista.evaluation.protocol import measure_labels, measure_next_items, measure_windows, window_lengths, window_metric
from vista.evaluation.trained_baselines import CounterTrees, NewItemTrees, PooledFactors, PooledItemVectors
from vista.log.event_log import EventLog
from vista.log.splits import leaves_out_seen, split_until, visible_counts
from vista.model.ranking_model import RankingModel
from vista.progress_bar import progress_bar, ticking
from vista.text_table import text_table

STANDING = f"ahead, behind: the model against the baseline, by two standard errors over users (paired); {LEVEL}"
LOSS = "log_loss"
"""Metrics whose name begins with this are better if they are smaller."""


@dataclass(frozen=True, slots=True)
class BaselineReport:
    """Metrics of each user, by baseline."""

    model: PerUserMetrics
    """Those of the model, of the same users."""

    per_user: dict[str, PerUserMetrics]
    tables: dict[str, dict[str, str]]
    """What is printed: {"next 50 events": {"precision@10": "precision@10/50-events", …}, …}, names by column."""

    def metrics(self) -> dict[str, dict[str, float]]:
        """Means over users, by baseline and metric."""
        return {name: own.means() for name, own in self.per_user.items()}

    def standing(self, baseline: str, metric: str) -> str:
        """Whether the model is ahead of a baseline, behind it, or neither (level): by two standard errors of the paired
        difference. A dash if the metric is undefined."""
        gains = self.model.values[metric] - self.per_user[baseline].values[metric]
        gain = Estimate.of_users(-gains if metric.startswith(LOSS) else gains)
        if not math.isfinite(gain.value):
            return "–"
        return gain.standing if math.isfinite(gain.error) else "level"

    def save(self, out: str) -> None:
        """Write the metrics of each user where `vista compare` finds them under the name <out>.<baseline>."""
        for name, own in self.per_user.items():
            own.save(per_user_path(f"{out}.{name.replace(',', '').replace(' ', '-')}"))

    def __str__(self) -> str:
        tables = []
        for title, columns in self.tables.items():
            header = [f"baselines, {title}", *columns]
            rows = [["the model", *(mean_cell(self.model.values[name]) for name in columns.values())]]
            for baseline, own in self.per_user.items():
                cells = [(mean_cell(own.values[name]), self.standing(baseline, name)) for name in columns.values()]
                rows.append([baseline, *(f"{cell} {standing}" for cell, standing in cells)])
            tables.append(text_table(header, rows))
        return "\n".join([*tables, STANDING])


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


def measure_baselines(
    model: RankingModel, log: EventLog, config: EvaluateConfig, own: PerUserMetrics
) -> BaselineReport:
    """Measure the counting baselines on the cases of a model, and with baselines=trained also those that learn.

    Args:
        own: metrics of the model.

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
    return BaselineReport(own, measured, tables)


def measure_label_baselines(
    model: RankingModel, log: EventLog, config: EvaluateConfig, cases: ImpressionCases, own: PerUserMetrics
) -> BaselineReport | None:
    """Measure the baselines for labels on the impressions of a model; None if they have nothing to be fitted to.

    Args:
        cases, own: impressions and metrics of the model.

    Raises:
        MissingDependencyError: scikit-learn is not installed, and trained baselines are asked for.
    """
    trained = config.baselines is AskedBaselines.trained
    answers = label_baselines(log, model.data, cases, trained=trained)
    measured = {name: measure_labels(log, cases, answer, config.split) for name, answer in answers.items()}
    return BaselineReport(own, measured, {"labels": {name: name for name in own.values}}) if measured else None


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
    score = fitted_scores(baseline, log, visible_counts(log, split_until(data, config.split)), columns)
    if config.target is Target.window:
        _, per_user = measure_windows(log, data, columns, config, score)
    else:
        _, per_user = measure_next_items(log, data, columns, config, score)
    if not len(per_user.users):
        raise ConfigError(f"{log.path} has no {config.split} label to rank; choose another split")
    return per_user
