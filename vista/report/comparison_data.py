"""The runs and baselines of a report as measures over the same cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vista.arrays import Float32s
from vista.config import EvaluateConfig
from vista.config.choices import Target
from vista.errors import ConfigError
from vista.evaluation.baseline_evaluation import impression_baselines, measure_baseline, measure_baselines
from vista.evaluation.cases import ImpressionCases, next_item_cases
from vista.evaluation.comparison import AucMeasure, MeanMeasure, Measure, PerUserMetrics
from vista.evaluation.protocol import split_windows, window_lengths, window_metric
from vista.evaluation.trained_baselines import PooledItemVectors
from vista.log.event_log import EventLog
from vista.log.splits import part_counts
from vista.report.measured_run import MeasuredRun

ORACLE = "oracle"


@dataclass(frozen=True, slots=True)
class ComparisonData:
    """Everything that the sections about quality show."""

    runs: list[str]
    """Names of the runs; the report is about the first one."""
    ranking: dict[str, PerUserMetrics]
    """Metrics of ranking per user, by run or baseline; empty if the model does not rank."""
    impressions: ImpressionCases | None
    probabilities: dict[str, Float32s]
    """{run, baseline, or oracle: [N, tasks]} of the impressions; empty without them."""
    measures: list[Measure]
    """The first task's AUC, and the most important metric of ranking."""
    shown: list[str]
    """What sections show that split the cases: the runs, the oracle, pooled vectors, and the best other baseline."""

    @property
    def own(self) -> str:
        """The run that the report is about."""
        return self.runs[0]

    def color(self, name: str) -> int:
        """Number of the color of a predictor in all charts."""
        return self.shown.index(name)

    @classmethod
    def of(
        cls, runs: Sequence[MeasuredRun], log: EventLog, config: EvaluateConfig, *, baselines: bool
    ) -> ComparisonData:
        """Measure the baselines on the cases of the runs, and collect all of them.

        Args:
            runs: the run of the report first; all have been measured with `config`.

        Raises:
            ConfigError: a run was measured on other cases, because its data split or its tasks differ.
        """
        own = runs[0]
        ranking = {run.name: run.evaluation.per_user for run in runs if run.evaluation.per_user is not None}
        if own.name not in ranking:
            ranking = {}
        for run in runs[1:]:
            if run.name in ranking and ranking[run.name].question != ranking[own.name].question:
                raise ConfigError(
                    f"others: {run.record.folder} was evaluated on other cases than {own.record.folder}, because its "
                    "data split differs; name runs with the same data.*"
                )
        cases, probabilities = own.evaluation.impressions, {}
        if cases is not None:
            for run in runs:
                asked, answers = run.evaluation.impressions, run.evaluation.probabilities
                if asked is None or answers is None:
                    continue
                if asked.tasks != cases.tasks or not np.array_equal(asked.timestamp, cases.timestamp):
                    raise ConfigError(
                        f"others: {run.record.folder} was measured on other impressions or tasks than "
                        f"{own.record.folder}; name runs with the same data.* and optim.tasks"
                    )
                probabilities[run.name] = answers
        if baselines and ranking:
            ranking |= _ranking_baselines(own, log, config)
        if baselines and cases is not None:
            probabilities |= impression_baselines(log, own.model.data, cases)
        if cases is not None and cases.probability is not None:
            probabilities[ORACLE] = cases.probability.astype(np.float32)
        names = [run.name for run in runs]
        measures: list[Measure] = []
        if cases is not None and cases.tasks:
            mask = cases.mask[:, 0]
            measures.append(
                AucMeasure(
                    cases.tasks[0],
                    cases.user[mask],
                    cases.seen[mask],
                    cases.item[mask],
                    cases.label[mask, 0],
                    {name: values[mask, 0] for name, values in probabilities.items()},
                )
            )
        if ranking:
            measures.append(_ranking_measure(ranking, own, log, config))
        return cls(names, ranking, cases, probabilities, measures, _shown(names, measures))


def _ranking_baselines(own: MeasuredRun, log: EventLog, config: EvaluateConfig) -> dict[str, PerUserMetrics]:
    horizon = 1 if config.target is Target.next else config.horizon_events[0]
    columns = own.model.rows_of(log.items) - 1
    pooled = PooledItemVectors(horizon_events=horizon)
    measured = measure_baselines(own.model, log, config).per_user
    return measured | {pooled.name: measure_baseline(pooled, log, own.model.data, config, columns)}


def head_metric(config: EvaluateConfig) -> str:
    """The metric of ranking by which predictors are compared where only one is shown."""
    if config.target is Target.next:
        return f"ndcg@{config.top_k[0]}"
    return window_metric(f"precision@{config.top_k[0]}", next(iter(window_lengths(config))))


def _ranking_measure(
    ranking: dict[str, PerUserMetrics], own: MeasuredRun, log: EventLog, config: EvaluateConfig
) -> MeanMeasure:
    metric = head_metric(config)
    values = {name: each.values[metric] for name, each in ranking.items()}
    if config.target is Target.next:
        asked = next_item_cases(log, *part_counts(log, own.model.data, config.split))
        return MeanMeasure(f"{metric} of the next item", metric, asked.user, asked.seen, asked.item, values)
    windows = next(iter(split_windows(log, own.model.data, config).values()))
    title = f"precision@{config.top_k[0]} of the next {config.horizon_events[0]} events"
    return MeanMeasure(title, metric, windows.user, windows.seen, None, values)


def _shown(runs: list[str], measures: Sequence[Measure]) -> list[str]:
    chosen = [*runs, ORACLE, "pooled vectors"]
    for measure in measures:
        estimates = measure.estimates()
        named = [name for name in measure.names if name not in (*runs, ORACLE, "pooled vectors")]
        others = [name for name in named if np.isfinite(estimates[name].value)]
        chosen += [max(others, key=lambda name: estimates[name].value)] if others else []
    return list(dict.fromkeys(chosen))
