"""A counting baseline, measured on the next items of a log's test split, or on the windows of a part."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from vista.config import DataConfig, EvaluateConfig
from vista.errors import ConfigError
from vista.evaluation.baselines.baseline_answers import BaselineAnswers
from vista.evaluation.baselines.counting_baseline import CountingBaseline
from vista.evaluation.cases import next_item_cases
from vista.evaluation.evaluation_report import EvaluationReport
from vista.evaluation.protocol import ranking_metrics
from vista.evaluation.window_evaluation import measure_windows
from vista.log.event_log import EventLog
from vista.log.repeats import leaves_out_seen
from vista.log.splits import split_until, visible_counts


def evaluate_baseline(
    baseline: CountingBaseline, log: EventLog, data: DataConfig, *, top_k: list[int] | None = None, seed: int = 0
) -> EvaluationReport:
    """Fit a baseline to the events before the test labels of a log's split, and rank the labels.

    Args:
        data: the split, and whether to leave out seen items (`exclude_seen`).
        top_k: cutoffs of the metrics, by default [10].

    Raises:
        ConfigError: if the log has no test label.
    """
    began = time.perf_counter()
    seen = visible_counts(log, split_until(data, "test"))
    cases = next_item_cases(log, seen)
    if not len(cases.user):
        raise ConfigError(f"{log.path} has no test label to rank; choose another split")
    baseline.fit(log, seen, np.random.default_rng(seed))
    ranks = BaselineAnswers(baseline, log).next_ranks(cases, exclude_seen=leaves_out_seen(log, data))
    metrics = ranking_metrics(ranks, top_k or [10])
    return EvaluationReport(metrics, len(ranks), time.perf_counter() - began, ranks, None, None)


def evaluate_baseline_windows(
    baseline: CountingBaseline, log: EventLog, data: DataConfig, config: EvaluateConfig, *, seed: int = 0
) -> EvaluationReport:
    """Fit a baseline to the events before the labels of `config.split`, and measure the windows that follow.

    Args:
        data: the split.
        config: the part of the split, the windows and the metrics; what it says about files is not read.

    Raises:
        ConfigError: if no user has enough events.
    """
    began = time.perf_counter()
    baseline.fit(log, visible_counts(log, split_until(data, config.split)), np.random.default_rng(seed))
    report = measure_windows(
        log, data, np.arange(log.num_items), config, lambda cases: baseline.scores(cases.user, cases.seen, cases.now)
    )
    return replace(report, seconds=time.perf_counter() - began)
