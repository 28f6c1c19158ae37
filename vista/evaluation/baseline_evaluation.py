"""Counting baselines on the cases of a model: the same users, questions, and items to choose from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from vista.arrays import Floats, Int
from vista.config import DataConfig, EvaluateConfig
from vista.config.choices import Split, Target
from vista.errors import ConfigError
from vista.evaluation.baseline_report import BaselineReport
from vista.evaluation.baselines.all_baselines import LEARNED, counting_baselines, trained_baselines
from vista.evaluation.baselines.counting_baseline import CountingBaseline
from vista.evaluation.cases import NextItemCases
from vista.evaluation.next_evaluation import excludes_seen, measure_next_items
from vista.evaluation.per_user_metrics import PerUserMetrics
from vista.evaluation.window_cases import WindowCases
from vista.evaluation.window_evaluation import measure_windows, window_lengths
from vista.evaluation.window_report import window_metric
from vista.log.event_log import EventLog
from vista.log.splits import split_until, visible_counts
from vista.model.ranking_model import RankingModel
from vista.progress_bar import progress_bar, ticking


def measure_baselines(model: RankingModel, log: EventLog, config: EvaluateConfig) -> BaselineReport:
    """Measure the counting baselines on the cases of a model, and with `trained_baselines` also those that learn.

    Raises:
        ConfigError: as `measure_baseline`.
        MissingDependencyError: scikit-learn is not installed, and `trained_baselines` is set.
    """
    is_window = config.target is Target.window
    returns = is_window or not excludes_seen(log, model.data, config)
    columns = model.rows_of(log.items) - 1
    horizons = asked_horizons(config)
    known = {"has_time": log.has_time, "returns": returns, "has_features": log.item_features is not None}
    by_horizon = [counting_baselines(horizon_events=n, **known) for n in horizons]
    if config.trained_baselines:
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


def scores_in_columns(baseline: CountingBaseline, columns: Int, cases: NextItemCases | WindowCases) -> Floats:
    """Scores float64 [n, V] of a fitted baseline, at the times of the questions.

    Args:
        columns: as in `measure_baseline`. A column that no item of the log has scores -inf.
    """
    scores = baseline.scores(cases.user, cases.seen, cases.now)
    known = np.flatnonzero(columns >= 0)
    out = np.full((len(scores), columns.max(initial=0) + 1), -np.inf)
    out[:, columns[known]] = scores[:, known]
    return out
