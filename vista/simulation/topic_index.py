"""How often and how long ago a topic occurs in ranges of packed events."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer[Any]]


class TopicIndex:
    """Finds a topic's events in any range of packed events, by binary search.

    Args:
        topic: [T] topics of the packed events.
    """

    def __init__(self, topic: NDArray[np.uint8]) -> None:
        self._stride = len(topic) + 1
        self._keys = topic.astype(np.int64)
        self._keys *= self._stride
        self._keys += np.arange(len(topic))
        self._keys.sort()

    def count(self, topic: IntArray, start: IntArray, stop: IntArray) -> NDArray[np.int64]:
        """Events of `topic` [N] among the packed events start..stop-1 [N]."""
        base = topic.astype(np.int64) * self._stride
        return np.asarray(np.searchsorted(self._keys, base + stop) - np.searchsorted(self._keys, base + start))

    def age(self, topic: IntArray, start: IntArray, stop: IntArray) -> NDArray[np.int64]:
        """Events of start..stop-1 newer than the newest event of `topic`: int64 [N], -1 if there is no such event."""
        base = topic.astype(np.int64) * self._stride
        before = np.searchsorted(self._keys, base + stop)
        newest = self._keys[np.maximum(before - 1, 0)] - base
        return np.where((before > 0) & (newest >= start), stop - 1 - newest, -1)
