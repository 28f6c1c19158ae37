"""Counting baselines: the quality of counting, without a model. A model that does not beat them has learned nothing.

- popularity: an item's number of visible events.
- transitions: how often an item came right after the user's newest one, over all users; popularity breaks ties.
"""

from __future__ import annotations

import time
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config import DataConfig
from vista.errors import ConfigError
from vista.evaluation.cases import NextItemCases, next_item_cases
from vista.evaluation.evaluation_report import EvaluationReport
from vista.evaluation.protocol import case_batches, rank_next_items, ranking_metrics
from vista.examples.frequency import item_counts
from vista.log.event_log import EventLog
from vista.log.histories import ranges
from vista.log.splits import split_until, visible_counts

Scores = NDArray[np.float64]


class CountingBaseline(Enum):
    """What is counted."""

    popularity = "popularity"
    transitions = "transitions"


def evaluate_counting_baseline(
    baseline: CountingBaseline, log: EventLog, data: DataConfig, *, top_k: list[int] | None = None
) -> EvaluationReport:
    """Rank the test labels of a log's split by what was counted before them.

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
    popularity = item_counts(log, seen).astype(np.float64)
    transitions = _Transitions(log, seen, popularity) if baseline is CountingBaseline.transitions else None
    ranks = rank_next_items(
        log,
        cases,
        np.arange(log.num_items),
        lambda batch: transitions.scores(batch) if transitions else np.tile(popularity, (len(batch.user), 1)),
        case_batches(cases, log.num_items, users_per_batch=512),
        exclude_seen=data.exclude_seen,
    )
    metrics = ranking_metrics(ranks, top_k or [10])
    return EvaluationReport(metrics, len(ranks), time.perf_counter() - began, ranks, None, None)


class _Transitions:
    """Counted pairs of adjacent events: item i was followed by `_next[_offsets[i]:_offsets[i + 1]]`."""

    def __init__(self, log: EventLog, seen: Int, popularity: Scores) -> None:
        """
        Args:
            seen: int64 [num_users] events that may be counted.
            popularity: float64 [num_items] of integers.
        """
        histories = log.gather(np.arange(log.num_users), seen)
        item = histories.item.astype(np.int64)
        follows = np.ones(len(item), bool)
        follows[histories.offsets[:-1][histories.lengths > 0]] = False
        later = np.flatnonzero(follows)
        pair, self._times = np.unique(item[later - 1] * log.num_items + item[later], return_counts=True)
        first, self._next = np.divmod(pair, log.num_items)
        self._offsets = np.searchsorted(first, np.arange(log.num_items + 1))
        # One transition outweighs any popularity. Sums of integers, so exact.
        self._weight = popularity.max(initial=0) + 1
        self._popularity = popularity
        self._log = log

    def scores(self, cases: NextItemCases) -> Scores:
        """float64 [n, num_items] after each case's newest visible event; only popularity if there is none."""
        newest = self._log.gather_ranges(cases.user, cases.seen - 1, cases.seen)
        row = np.repeat(np.arange(len(cases.user)), newest.lengths)
        begin = self._offsets[newest.item]
        count = self._offsets[newest.item + 1] - begin
        followers = ranges(begin, count)
        out = np.tile(self._popularity, (len(cases.user), 1))
        out[np.repeat(row, count), self._next[followers]] += self._times[followers] * self._weight
        return out
