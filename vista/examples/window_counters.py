"""The counters that requests in training windows read. Letters: NW windows, n requests, F values per key."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.counters.counter_codes import CounterCodes
from vista.examples.chunks import ChunkCounters
from vista.examples.counted_requests import CountedRequests
from vista.examples.windows import ChunkWindows


@dataclass(frozen=True, slots=True)
class WindowCounters:
    """Counters of requests at positions of a batch's windows."""

    chunks: ChunkCounters
    windows: ChunkWindows
    cut: Int | None
    """int64 [NW] events of the chunk that each window's summary covers; None counts all events before each request."""
    tail_len: int

    def at(self, window: Int, position: Int, time: Int, is_timed: NDArray[np.bool_]) -> CounterCodes:
        """The counters of n requests.

        Args:
            window: int64 [n].
            position: int64 [n] events of the chunk before the request.
            time: int64 [n] ms.
            is_timed: bool [n]: False where the scorer would not be told the time.
        """
        return self.chunks.histories.at(self._requests(window, position, time, is_timed))

    def of_items(
        self, window: Int, position: Int, time: Int, is_timed: NDArray[np.bool_], item: Int
    ) -> NDArray[np.uint8]:
        """Codes uint8 [n, F] of one item, int64 [n] model rows, per request; 0 if it is not counted."""
        return self.chunks.histories.of_items(self._requests(window, position, time, is_timed), item)

    def num_events(self, window: Int, position: Int) -> Int:
        """int64 [n] events that the counters cover."""
        return self._requests(window, position, position, position > 0).num_events

    def _requests(self, window: Int, position: Int, time: Int, is_timed: NDArray[np.bool_]) -> CountedRequests:
        chunks, chunk = self.chunks, self.windows.chunk[window]
        start = chunks.start[chunk]
        if chunks.covered is not None:
            covered = chunks.covered[chunk]
        else:
            covered = start + (position if self.cut is None else self.cut[window])
        tail_start = start + np.maximum(self.windows.end[window] - self.tail_len, 0)
        return CountedRequests(chunks.history[chunk], covered, tail_start, start + position, time, is_timed)
