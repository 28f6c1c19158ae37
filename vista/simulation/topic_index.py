"""How often and how long ago a topic occurs in ranges of packed events."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer[Any]]


class TopicIndex:
    """Finds the events of a topic, or of any other key such as an item, in ranges of packed events by binary search.

    Args:
        topic: [T] topics or other keys of the packed events, at least 0.
    """

    def __init__(self, topic: IntArray) -> None:
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

    def first(self, topic: IntArray, start: IntArray, stop: IntArray) -> NDArray[np.int64]:
        """Packed index of the oldest event of `topic` [N] among start..stop-1: int64 [N], `stop` if there is none."""
        base = topic.astype(np.int64) * self._stride
        at = np.searchsorted(self._keys, base + start)
        oldest = self._keys[np.minimum(at, len(self._keys) - 1)] - base
        return np.where(at < len(self._keys), np.minimum(oldest, stop), stop)
