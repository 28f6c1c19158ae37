"""How often two items lie close together in the histories of a log, counted in blocks of users.

Letters: P pairs of items, T events of a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from vista.arrays import Int
from vista.log.event_log import EventLog
from vista.log.histories import Histories
from vista.log.splits import random_users_counts, visible_blocks

REACH = 15
"""Two events of a history form a pair if one comes at most this many positions after the other."""
BLOCK_EVENTS = 1 << 19
"""Events whose pairs are counted at once (a longer history is read alone)."""


class PairCounts(NamedTuple):
    """How often two different items form a pair, in any order."""

    low: Int
    """int64 [P], the smaller row; ascending."""
    high: Int
    """int64 [P], the larger row; ascending for each `low`."""
    times: Int
    """int64 [P]."""


def pair_counts(
    log: EventLog, item_rows: Int, counts: Int, *, most_events: int, rng: np.random.Generator
) -> PairCounts:
    """Count the pairs of different items within REACH events of each other.

    Args:
        item_rows: int64 [log.num_items], a row for each of the log's items; pairs with row 0 are not counted.
        counts: int64 [num_users], visible events per user. Nothing after them is read.
        most_events: count the pairs of random users if there are more events. Memory grows with the number of distinct
            pairs, which is at most REACH per event.
        rng: chooses these users.
    """
    counts = random_users_counts(counts, most_events, rng, "pairs of items are counted among", least=2)
    width = int(item_rows.max(initial=0)) + 1
    blocks = visible_blocks(log, counts, BLOCK_EVENTS)
    key, times = distinct_counts(_near_keys(block, item_rows, width) for block in blocks)
    return PairCounts(key // width, key % width, times)


def distinct_counts(blocks_of_keys: Iterable[Int]) -> tuple[Int, Int]:
    """The distinct keys int64 (at least 0), ascending, and how often each occurs, int64."""
    key, times = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for keys in blocks_of_keys:
        new, count = np.unique(keys, return_counts=True)
        both = np.concatenate([key, new])
        order = np.argsort(both, kind="stable")  # merges two sorted runs, in linear time
        both = both[order]
        first = np.flatnonzero(np.diff(both, prepend=-1))
        key, times = both[first], np.add.reduceat(np.concatenate([times, count])[order], first)
    return key, times


def _near_keys(histories: Histories, item_rows: Int, width: int) -> Int:
    """low * width + high of every pair."""
    item, owner = item_rows[histories.item], histories.owner
    keys = []
    for distance in range(1, REACH + 1):
        a, b = item[:-distance], item[distance:]
        near = (owner[:-distance] == owner[distance:]) & (a != b) & (a > 0) & (b > 0)
        keys.append(np.minimum(a[near], b[near]) * width + np.maximum(a[near], b[near]))
    return np.concatenate(keys)
