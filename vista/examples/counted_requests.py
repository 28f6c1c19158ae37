"""Requests whose counters are asked for. Letters: n requests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int


@dataclass(frozen=True, slots=True)
class CountedRequests:
    """Requests on histories: what the record covers, what of the rest the tail holds, and when."""

    user: Int
    """int64 [n] histories, from 0."""
    covered: Int
    """int64 [n] events that the record covers."""
    tail_start: Int
    """int64 [n] position of the tail's first event. Events between the record and the tail are not counted, because
    nobody tells the scorer of them."""
    seen: Int
    """int64 [n] events before the request."""
    now: Int
    """int64 [n] times in ms."""
    is_timed: NDArray[np.bool_]
    """bool [n]: False where the caller passes no time. Counters are then those of the newest event."""

    @property
    def first(self) -> Int:
        """int64 [n] position of the first event that is added to the record's counters."""
        return np.minimum(np.maximum(self.covered, self.tail_start), self.seen)

    @property
    def num_events(self) -> Int:
        """int64 [n] events that the counters cover in the end."""
        return self.covered + self.seen - self.first
