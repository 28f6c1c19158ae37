"""The protocol's cases, answered by a fitted counting baseline. Its columns are the log's items.

Letters: N cases, V items of the log.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vista.arrays import Int
from vista.evaluation.baselines.counting_baseline import CountingBaseline
from vista.evaluation.cases import NextItemCases
from vista.evaluation.metrics import Floats
from vista.evaluation.protocol import case_batches, rank_next_items, seen_columns
from vista.evaluation.window_cases import WindowCases
from vista.evaluation.window_metrics import window_metrics
from vista.log.event_log import EventLog

_USERS_PER_BATCH = 128


class BaselineAnswers:
    """A fitted baseline, and the log that it was fitted to."""

    def __init__(self, baseline: CountingBaseline, log: EventLog) -> None:
        self._baseline, self._log = baseline, log
        self._columns = np.arange(log.num_items)

    def next_ranks(self, cases: NextItemCases, *, exclude_seen: bool) -> Int:
        """0-based ranks int64 [N] of the labels, each asked right after the user's newest event.

        Args:
            exclude_seen: leave the user's earlier items out of the list (never the label).
        """
        return rank_next_items(
            self._log,
            cases,
            self._columns,
            lambda batch: self._baseline.scores(batch.user, batch.seen, None),
            case_batches(cases, self._log.num_items, _USERS_PER_BATCH),
            exclude_seen=exclude_seen,
        )

    def window_metrics(self, cases: WindowCases, ks: Sequence[int]) -> dict[str, Floats]:
        """Metrics float64 [N] per case, as `vista.evaluation.window_metrics.window_metrics` names them."""
        parts = []
        for batch in map(cases.part, case_batches(cases, self._log.num_items, _USERS_PER_BATCH)):
            scores = self._baseline.scores(batch.user, batch.seen, batch.now)
            seen = seen_columns(self._log, batch, self._columns)
            parts.append(window_metrics(scores, batch, self._columns, seen, ks))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
