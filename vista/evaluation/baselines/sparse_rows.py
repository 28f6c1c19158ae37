"""Sparse matrices, packed by rows: counted pairs of items, and vectors over items.

Letters: R rows, C columns, E entries, V items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Floats, Int
from vista.examples.pair_counts import distinct_counts, pair_counts
from vista.log.event_log import EventLog
from vista.log.histories import Histories, ranges
from vista.log.splits import visible_blocks

MOST_EVENTS = 1 << 21
"""Events in which pairs within REACH events are counted: those of random users if there are more. It bounds the
memory: 3 GB if all pairs are distinct, and half of that in a catalog of 5,000 items."""


@dataclass(frozen=True, slots=True)
class SparseRows:
    """Row i has value[offsets[i] : offsets[i + 1]] at the same places of `column`."""

    offsets: Int
    """int64 [R + 1]."""
    column: Int
    """int64 [E], ascending in each row."""
    value: Floats
    """float64 [E]."""
    num_columns: int

    @property
    def row(self) -> Int:
        """int64 [E]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def dense(self) -> Floats:
        """float64 [R, C]."""
        out = np.zeros((len(self.offsets) - 1, self.num_columns))
        out[self.row, self.column] = self.value
        return out

    def cells(self, rows: NDArray[np.integer[Any]]) -> tuple[Int, Int]:
        """Places in `column` and `value` of some rows [n], concatenated, and the number of each row's entries [n]."""
        begin = self.offsets[rows]
        count = self.offsets[rows + 1] - begin
        return ranges(begin, count), count

    def weighted_sum(self, rows: NDArray[np.integer[Any]], weight: Floats) -> Floats:
        """Sum of rows [n] with weights [n]: float64 [C]."""
        place, count = self.cells(rows)
        values = self.value[place] * np.repeat(weight, count)
        total: Floats = np.bincount(self.column[place], values, self.num_columns).astype(np.float64, copy=False)
        return total


def transition_counts(log: EventLog, counts: Int) -> SparseRows:
    """How often item j came right after item i in the visible events of one history: row i, column j."""
    key, times = distinct_counts(_following_keys(block, log.num_items) for block in visible_blocks(log, counts))
    row, column = np.divmod(key, log.num_items)
    offsets = np.searchsorted(row, np.arange(log.num_items + 1))
    return SparseRows(offsets, column, times.astype(np.float64), log.num_items)


def co_occurrences(log: EventLog, counts: Int, rng: np.random.Generator) -> SparseRows:
    """How often two different items lie within REACH visible events of each other in one history; symmetric.

    Args:
        rng: chooses users if the log has more than MOST_EVENTS visible events.
    """
    low, high, times = pair_counts(log, np.arange(log.num_items) + 1, counts, most_events=MOST_EVENTS, rng=rng)
    # In the order of its rows, each half has ascending columns, and those of the first half come first.
    row = np.concatenate([high, low])
    order = np.argsort(row, kind="stable")
    offsets = np.cumsum(np.bincount(row, minlength=log.num_items + 1))
    del row  # large
    column = np.concatenate([low, high])[order] - 1
    return SparseRows(offsets, column, np.concatenate([times, times])[order].astype(np.float64), log.num_items)


def _following_keys(histories: Histories, num_items: int) -> Int:
    """i * num_items + j of every transition."""
    item = histories.item.astype(np.int64)
    follows = np.flatnonzero(np.diff(histories.owner) == 0)
    return item[follows] * num_items + item[follows + 1]
