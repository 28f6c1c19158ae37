"""Gaps between events in logarithmic buckets, as event and request embeddings use them, and limits of times."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MINUTE_MS = 60_000
DAY_MS = 86_400_000
UNKNOWN_GAP = 0
NUM_GAPS = 40
"""Bucket 0 is an unknown gap; others are 1 + floor(log2(1 + seconds)), up to 17,000 years."""
NO_TIMESTAMP = -(1 << 63)
"""The time of an event that does not exist, such as the newest one of an empty history."""
YEAR_1971_MS = 31_536_000_000
"""1971-01-01. Seconds that are read as milliseconds are before it, up to the year 2969."""
LATEST_MS = 4_102_444_800_000
"""2100-01-01. Later times are treated as errors."""


def gap_bucket(gap_ms: NDArray[np.int64]) -> NDArray[np.int64]:
    """Logarithmic bucket of a time difference.

    Args:
        gap_ms: int64, any shape, milliseconds. Negative differences count as 0.

    Returns:
        int64 of the same shape in [1, NUM_GAPS).
    """
    seconds = np.maximum(gap_ms, 0) / 1000.0
    return np.minimum(1 + np.log2(1.0 + seconds).astype(np.int64), NUM_GAPS - 1)


def history_gaps(timestamp: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bucket of the gap between each packed event and the previous one; unknown for a user's first event.

    Args:
        timestamp: int64 [T], milliseconds.
        offsets: int64 [B+1].

    Returns:
        int64 [T].
    """
    gaps = np.zeros(len(timestamp), np.int64)
    if len(timestamp) > 1:
        gaps[1:] = gap_bucket(np.diff(timestamp))
    starts = offsets[:-1]
    gaps[starts[starts < offsets[1:]]] = UNKNOWN_GAP
    return gaps
