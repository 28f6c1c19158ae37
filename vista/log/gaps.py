"""Time between events in log buckets: what event and request embeddings see of time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UNKNOWN_GAP = 0
NUM_GAPS = 40
"""Bucket 0 is unknown; bucket 1 + floor(log2(1 + seconds)) otherwise, up to 17,000 years."""
YEAR_1971_MS = 31_536_000_000
"""1971-01-01: seconds taken for milliseconds fall before it, until the year 2969."""
LATEST_MS = 4_102_444_800_000
"""2100-01-01: a later time is absurd."""


def gap_bucket(gap_ms: NDArray[np.int64]) -> NDArray[np.int64]:
    """Log bucket of a time difference.

    Args:
        gap_ms: int64, any shape, milliseconds; negative differences count as 0 (equal times in another order).

    Returns:
        int64 of the same shape in [1, NUM_GAPS).
    """
    seconds = np.maximum(gap_ms, 0) / 1000.0
    return np.minimum(1 + np.log2(1.0 + seconds).astype(np.int64), NUM_GAPS - 1)


def history_gaps(timestamp: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Gap bucket of each packed event to the one before it; a user's first event has an unknown gap.

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
