"""Whether users return to items, which decides whether rankings leave seen items out."""

from __future__ import annotations

import logging

import numpy as np

from vista.arrays import Int
from vista.config import DataConfig
from vista.log.event_log import EventLog
from vista.log.splits import EVENTS_PER_BLOCK, split_until, visible_blocks, visible_counts

RETURNING = 0.01
"""Least share of repeats with which users return to items. Logs of movies or news, seen once each, have hardly any."""
logger = logging.getLogger(__name__)


def repeat_share(log: EventLog, counts: Int) -> float:
    """Share of events whose item is in an earlier event of the same user; 0 without events.

    Args:
        counts: int64 [num_users], the number of leading events of each user that are read.
    """
    distinct = 0
    for block in visible_blocks(log, counts, EVENTS_PER_BLOCK):
        distinct += len(np.unique(block.owner * log.num_items + block.item))
    total = int(counts.sum())
    return 1 - distinct / total if total else 0.0


def leaves_out_seen(log: EventLog, data: DataConfig) -> bool:
    """`data.exclude_seen`, or if that is null, whether less than RETURNING of the training events are repeats."""
    if data.exclude_seen is not None:
        return data.exclude_seen
    share = repeat_share(log, visible_counts(log, split_until(data, "train")))
    exclude_seen = share < RETURNING
    logger.info("data.exclude_seen=%s: %.1f %% of the events are repeats", str(exclude_seen).lower(), 100 * share)
    return exclude_seen
