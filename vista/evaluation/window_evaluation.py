"""Quality over the window that follows a question: what users do in the next events or days."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config import DataConfig, EvaluateConfig
from vista.errors import ConfigError
from vista.evaluation.cases_digest import cases_digest
from vista.evaluation.per_user_metrics import PerUserMetrics
from vista.evaluation.protocol import case_batches, rank_windows
from vista.evaluation.window_cases import WindowCases, window_cases
from vista.evaluation.window_report import WindowReport
from vista.examples.frequency import item_counts
from vista.log.event_log import EventLog
from vista.log.gaps import DAY_MS
from vista.log.splits import part_counts, part_times, split_until, visible_counts
from vista.progress_bar import progress_bar
from vista.ranks import Ranks

Scores = NDArray[np.floating[Any]]


def split_windows(log: EventLog, data: DataConfig, config: EvaluateConfig) -> dict[str, WindowCases]:
    """The cases of a part of the split, by length of the window: the same users and questions in all.

    With split=time, the question is asked when the labels begin. Other splits give no time: each user is asked just
    after the newest visible event. In validation, windows stop before the test labels.

    Raises:
        ConfigError: no user has enough events, or days are asked of a log without times, or of one that ends before.
    """
    if config.horizon_days:
        _check_days(log, data, config)
    seen, first, end = part_counts(log, data, config.split)
    now, _ = part_times(data, config.split)
    least = {"min_seen": config.min_seen, "min_after": config.min_after}
    cases = {
        name: window_cases(log, seen, end, first=first, now=now, **least, **length)
        for name, length in window_lengths(config).items()
    }
    if not len(next(iter(cases.values()))):
        raise ConfigError(
            f"{log.path}: no user has min_seen={config.min_seen} events until {split_until(data, config.split)} and "
            f"min_after={config.min_after} later events that are {config.split} labels; lower these, or train with "
            "data=time or data=share, which hold out more than one event"
        )
    return cases


def window_lengths(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """{"50 events": {"horizon_events": 50}, …} or {"30 days": {"horizon_days": 30}}: arguments of `window_cases`."""
    if config.horizon_days:
        return {f"{config.horizon_days:g} days": {"horizon_days": config.horizon_days}}
    return {f"{n} events": {"horizon_events": n} for n in config.horizon_events}


def _check_days(log: EventLog, data: DataConfig, config: EvaluateConfig) -> None:
    """Refuse windows of days in a log without times, or that the events of a split by time do not span.

    They may lack a tenth: the newest event is older than the end of the period in which events were recorded.
    """
    if not log.has_time:
        raise ConfigError(f"horizon_days={config.horizon_days:g}: {log.path} has no times; set horizon_events")
    (begin, end), newest = part_times(data, config.split), log.time_range()
    if begin is None or newest is None:
        return
    end = newest[1] if end is None else end
    days = (end - begin) / DAY_MS
    if days < 0.9 * config.horizon_days:
        what = "data.test_from comes" if config.split == "validation" else f"{log.path} ends"
        raise ConfigError(
            f"horizon_days={config.horizon_days:g}: {what} {days:.1f} days after the question; ask for at most as many"
        )


def measure_windows(
    log: EventLog,
    data: DataConfig,
    columns: Int,
    config: EvaluateConfig,
    score: Callable[[WindowCases], Scores],
    ranks: Ranks | None = None,
) -> tuple[WindowReport, PerUserMetrics]:
    """Ask all cases of `split_windows`, and compute the metrics of each user.

    If a label is an item without events before the part, the metrics include those of cold items.

    Args:
        data: the split.
        columns: int64 [log.num_items], the column of each of the log's items in the scores; -1 where the model does
            not know the item.
        score: some cases -> [n, V] scores of the model's items.
        ranks: processes that each answer a part of the cases; None for a single process.

    Raises:
        ConfigError: as `split_windows`.
    """
    cases = split_windows(log, data, config)
    first = next(iter(cases.values()))
    own = slice(0, len(first)) if ranks is None else ranks.part_of(first.seen + 1)
    batches = case_batches(first.part(own), log.num_items, config.users_per_batch)
    shown = progress_bar(batches, desc="ranking", unit="batch", shown=config.progress, leave=False)
    cold = item_counts(log, visible_counts(log, split_until(data, config.split))) == 0
    asked = any(cold[each.item].any() for each in cases.values())
    parts = {name: each.part(own) for name, each in cases.items()}
    measured = rank_windows(log, parts, columns, score, shown, config.top_k, cold if asked else None)
    if ranks is not None:
        measured = {name: ranks.of_all_cases(metrics) for name, metrics in measured.items()}
    report = WindowReport(measured)
    question = {
        "target": config.target.value,
        "split": config.split,
        "horizon": list(cases),
        "min_seen": config.min_seen,
        "min_after": config.min_after,
        "cases": [
            cases_digest(log, each.user, each.item, each.seen, each.now, each.offsets) for each in cases.values()
        ],
    }
    return report, PerUserMetrics(log.users.ids(first.user), report.per_user(), question)
