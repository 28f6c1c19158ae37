"""Counting baselines on the cases of a model: the same users, questions, and items to choose from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vista.arrays import Int
from vista.config import EvaluateConfig
from vista.config.choices import Target
from vista.evaluation.baseline_report import BaselineReport
from vista.evaluation.baselines.all_baselines import counting_baselines
from vista.evaluation.baselines.counting_baseline import CountingBaseline
from vista.evaluation.cases import NextItemCases
from vista.evaluation.metrics import Floats
from vista.evaluation.next_evaluation import excludes_seen, measure_next_items
from vista.evaluation.window_cases import WindowCases
from vista.evaluation.window_evaluation import measure_windows
from vista.log.event_log import EventLog
from vista.log.splits import split_until, visible_counts
from vista.model.ranking_model import RankingModel


def measure_baselines(
    model: RankingModel, log: EventLog, config: EvaluateConfig, baselines: Sequence[CountingBaseline] | None = None
) -> BaselineReport:
    """Fit baselines to the events before the labels of a part of the model's split, and measure them as the model.

    Args:
        baselines: None takes all that need no more than counting.

    Raises:
        ConfigError: as `measure_windows`.
    """
    is_window = config.target is Target.window
    if baselines is None:
        baselines = counting_baselines(
            has_time=log.has_time,
            horizon_events=config.horizon_events[0] if is_window else 1,
            returns=is_window or not excludes_seen(log, model.data, config),
        )
    counts = visible_counts(log, split_until(model.data, config.split))
    columns = model.rows_of(log.items) - 1
    measured = {}
    for baseline in baselines:
        baseline.fit(log, counts, np.random.default_rng(0))

        def next_scores(cases: NextItemCases, fitted: CountingBaseline = baseline) -> Floats:
            return _in_columns(fitted.scores(cases.user, cases.seen, None), columns, len(model.items))

        def window_scores(cases: WindowCases, fitted: CountingBaseline = baseline) -> Floats:
            return _in_columns(fitted.scores(cases.user, cases.seen, cases.now), columns, len(model.items))

        if is_window:
            per_user = measure_windows(log, model.data, columns, config, window_scores).per_user
            assert per_user is not None
        else:
            _, _, per_user = measure_next_items(log, model.data, columns, config, next_scores)
        measured[baseline.name] = per_user
    names = list(next(iter(measured.values())).values)
    if is_window:  # too many to print all
        first = config.top_k[0]
        kinds = [f"precision@{first}", f"precision@{first}:returns", *(f"recall@{k}:new" for k in config.top_k)]
        names = [name for name in names if name.partition("/")[0] in kinds]
    return BaselineReport(measured, names)


def _in_columns(scores: Floats, columns: Int, num_items: int) -> Floats:
    """Scores [n, num_items] of the model's items, from those of the log's items; -inf for items not in the log."""
    known = np.flatnonzero(columns >= 0)
    out = np.full((len(scores), num_items), -np.inf)
    out[:, columns[known]] = scores[:, known]
    return out
