"""Item frequencies over the visible part of a log: exact, or from a count-min sketch of fixed size."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from vista.config.choices import Counting
from vista.errors import MissingDependencyError
from vista.install_command import install_command
from vista.log.event_log import EventLog
from vista.log.splits import EVENTS_PER_BLOCK, visible_blocks

logger = logging.getLogger(__name__)
RELATIVE_ERROR = 1e-5
"""Most that count-min overestimates an item, as a share of all events, with probability CONFIDENCE."""
CONFIDENCE = 0.999
"""Probability that an item's estimate stays within RELATIVE_ERROR. The two set the size of the sketch, 15 MB."""
_SEED = 9001


def item_frequency(
    log: EventLog,
    item_rows: NDArray[np.int64],
    counts: NDArray[np.int64],
    counting: Counting,
    has_features: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    """Training events of each model row, as negatives are drawn by them.

    Args:
        item_rows: int64 [num_items], the model row of each of the log's items; 0 is the unknown item.
        counts: int64 [num_users], visible events per user.
        counting: exactly, or by a count-min sketch.
        has_features: bool [at least largest row + 1], rows with a vector even without training events.

    Returns:
        int64 [largest row + 1].
    """
    frequency = np.zeros(int(item_rows.max(initial=0)) + 1, np.int64)
    count = item_counts if counting is Counting.exact else sketched_item_counts
    np.add.at(frequency, item_rows, count(log, counts))
    frequency[0] = 0  # the unknown item is never a label, so it must not be a negative
    if frequency.any():
        # With a random vector, an item without training events must be a negative, as often as the rarest items are.
        # Nothing else would keep it out of the top of users' lists.
        is_random = frequency == 0
        is_random[0] = False
        if has_features is not None:
            is_random &= ~has_features[: len(frequency)]
        frequency[is_random] = 1
    return frequency


def item_counts(
    log: EventLog, counts: NDArray[np.int64] | None = None, *, block_events: int = EVENTS_PER_BLOCK
) -> NDArray[np.int64]:
    """Events of each item among the first counts[u] events of every user u.

    Args:
        counts: int64 [num_users]; None counts all events.
        block_events: events that are read at once.

    Returns:
        int64 [num_items].
    """
    total = np.zeros(log.num_items, np.int64)
    for block in visible_blocks(log, log.lengths if counts is None else counts, block_events):
        total += np.bincount(block.item, minlength=log.num_items)
    return total


def sketched_item_counts(
    log: EventLog,
    counts: NDArray[np.int64] | None = None,
    *,
    relative_error: float = RELATIVE_ERROR,
    confidence: float = CONFIDENCE,
    block_events: int = EVENTS_PER_BLOCK,
) -> NDArray[np.int64]:
    """Like `item_counts`, from a count-min sketch (Cormode and Muthukrishnan 2005) that reads each block once.

    An estimate is never too small. With probability `confidence` it is too large by at most relative_error times all
    events. The sketch holds ceil(ln(1 / (1 - confidence))) x ceil(e / relative_error) counters, regardless of the
    numbers of items and events. It is linear, so blocks and their order do not matter. Its seed is fixed, so the same
    log gives the same estimates.

    Returns:
        int64 [num_items].

    Raises:
        MissingDependencyError: if the package `datasketches` is not installed.
    """
    try:
        from datasketches import count_min_sketch
    except ImportError as error:
        raise MissingDependencyError(
            f"data.frequencies=count_min needs datasketches ({error}); install it with: {install_command('sketches')}; "
            "or set data.frequencies=exact"
        ) from error
    num_hashes = count_min_sketch.suggest_num_hashes(confidence)
    num_buckets = count_min_sketch.suggest_num_buckets(relative_error)
    sketch = count_min_sketch(num_hashes, num_buckets, _SEED)
    for block in visible_blocks(log, log.lengths if counts is None else counts, block_events):
        distinct, times = np.unique(block.item, return_counts=True)
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
    # Weights are integers far below 2^53, so their float64 sums are exact.
    return np.fromiter(map(sketch.get_estimate, range(log.num_items)), np.float64, log.num_items).astype(np.int64)
