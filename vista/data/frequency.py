"""Exact item frequencies over the visible part of a log."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vista.data.event_log import EventLog

_BLOCK_EVENTS = 1 << 22


def item_counts(log: EventLog, counts: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Events of each item among the first counts[u] events of every user u (None: all events).

    Reads the log in blocks of users of about 4M events; a longer history makes a block of its own.

    Returns:
        int64 [num_items].
    """
    visible = log.lengths if counts is None else np.asarray(counts, np.int64)
    if visible.shape != (log.num_users,):
        raise ValueError(f"counts must have one entry a user ({log.num_users}), got shape {visible.shape}")
    total = np.zeros(log.num_items, np.int64)
    ends = np.cumsum(log.lengths)
    start = 0
    while start < log.num_users:
        base = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, base + _BLOCK_EVENTS, side="right")))
        block = log.gather(np.arange(start, stop), visible[start:stop])
        total += np.bincount(block.item, minlength=log.num_items)
        start = stop
    return total
