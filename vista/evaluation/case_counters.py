"""Counters for cases, made from a log as a store's records and a scorer's requests would have them.

Letters: n cases, T events, F values per key.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.counters.counter_codes import CounterCodes
from vista.counters.counter_spec import CounterSpec
from vista.examples.counted_requests import CountedRequests
from vista.examples.history_counters import HistoryCounters
from vista.log.event_log import EventLog


class CaseCounters:
    """Counters of cases: some users of a log, each after a number of events."""

    def __init__(
        self,
        spec: CounterSpec,
        log: EventLog,
        item_rows: Int,
        user: Int,
        seen: Int,
        now: Int | None,
        *,
        covered: Int | None = None,
        tail_len: int = 0,
    ) -> None:
        """
        Args:
            spec: of the model.
            log: holds the histories.
            item_rows: int64 [log.num_items], the model row of each of the log's items.
            user: int64 [n] rows of the log.
            seen: int64 [n] events before the question.
            now: int64 [n] ms of the questions; None if they have no time.
            covered: int64 [n] events that the user's record covers; None for all that come before the question.
            tail_len: newest events before the question that the scorer is told of, if its record lacks them.
        """
        self._histories, history = HistoryCounters.of(spec, log, item_rows, user, seen)
        is_timed = np.full(len(user), now is not None)
        self._requests = CountedRequests(
            history,
            seen if covered is None else covered,
            np.maximum(seen - tail_len, 0),
            seen,
            np.zeros_like(seen) if now is None else now,
            is_timed,
        )

    @property
    def num_events(self) -> Int:
        """int64 [n] events that the counters cover."""
        return self._requests.num_events

    def codes(self) -> CounterCodes:
        """The counters of each case."""
        return self._histories.at(self._requests)

    def of_items(self, item: Int) -> NDArray[np.uint8]:
        """Codes uint8 [n, F] of one item, int64 [n] model rows, per case; 0 if it is not counted."""
        return self._histories.of_items(self._requests, item)
