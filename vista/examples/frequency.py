"""Item frequencies over the visible part of a log: exact, or from a count-min sketch of fixed size."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vista.errors import MissingDependencyError
from vista.log.event_log import EventLog

logger = logging.getLogger(__name__)
_BLOCK_EVENTS = 1 << 22
RELATIVE_ERROR = 1e-5
"""Share of all events by which count-min overestimates an item at most, at CONFIDENCE."""
CONFIDENCE = 0.999
"""Chance that one item's estimate keeps within RELATIVE_ERROR; both together set the sketch's size, 15 MB."""
_SEED = 9001


def item_counts(log: EventLog, counts: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Events of each item among the first counts[u] events of every user u (None: all events).

    Reads the log in blocks of users of about 4M events; a longer history makes a block of its own.

    Returns:
        int64 [num_items].
    """
    total = np.zeros(log.num_items, np.int64)
    for item in _blocks(log, counts):
        total += np.bincount(item, minlength=log.num_items)
    return total


def sketched_item_counts(
    log: EventLog,
    counts: NDArray[np.int64] | None = None,
    *,
    relative_error: float = RELATIVE_ERROR,
    confidence: float = CONFIDENCE,
) -> NDArray[np.int64]:
    """As `item_counts`, from a count-min sketch (Cormode and Muthukrishnan 2005) that sees each block once.

    An estimate is never too small, and with probability `confidence` too large by at most relative_error times all
    events. The sketch holds ceil(ln(1 / (1 - confidence))) x ceil(e / relative_error) counters, however many items and
    events there are. It is linear: neither blocks nor their order matter, and its seed is fixed, so the same log gives
    the same estimates.

    Returns:
        int64 [num_items].

    Raises:
        MissingDependencyError: if the package `datasketches` is not installed.
    """
    try:
        from datasketches import count_min_sketch
    except ImportError as error:
        raise MissingDependencyError(
            "data.frequencies=count_min needs the extra: pip install 'vista-recsys[sketches]'; or set "
            "data.frequencies=exact"
        ) from error
    num_hashes = count_min_sketch.suggest_num_hashes(confidence)
    num_buckets = count_min_sketch.suggest_num_buckets(relative_error)
    sketch = count_min_sketch(num_hashes, num_buckets, _SEED)
    for item in _blocks(log, counts):
        distinct, times = np.unique(item, return_counts=True)
        for row, weight in zip(distinct.tolist(), times.tolist(), strict=True):
            sketch.update(row, weight)
    logger.info(
        "item frequencies: count-min over %d events, %d x %d counters (%.1f MB); an estimate is never too small, and "
        "with %.4g %% confidence at most %.1f events too large (%.2g of all)",
        sketch.total_weight,
        num_hashes,
        num_buckets,
        num_hashes * num_buckets * 8 / 1e6,
        100 * confidence,
        relative_error * sketch.total_weight,
        relative_error,
    )
    # Weights are whole numbers far below 2^53, so the float64 sums are exact.
    return np.fromiter(map(sketch.get_estimate, range(log.num_items)), np.float64, log.num_items).astype(np.int64)


def _blocks(log: EventLog, counts: NDArray[np.int64] | None) -> Iterator[NDArray[np.integer]]:
    """Item rows of the visible events, some users' at a time."""
    visible = log.lengths if counts is None else np.asarray(counts, np.int64)
    if visible.shape != (log.num_users,):
        raise ValueError(f"counts must have one entry a user ({log.num_users}), got shape {visible.shape}")
    ends = np.cumsum(log.lengths)
    start = 0
    while start < log.num_users:
        base = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, base + _BLOCK_EVENTS, side="right")))
        yield log.gather(np.arange(start, stop), visible[start:stop]).item
        start = stop
