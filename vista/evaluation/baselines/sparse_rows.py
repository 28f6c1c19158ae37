"""A sparse matrix of counted pairs of items, packed by rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vista.arrays import Int
from vista.evaluation.baselines.visible_events import VisibleEvents
from vista.evaluation.metrics import Floats
from vista.log.histories import ranges


@dataclass(frozen=True, slots=True)
class SparseRows:
    """Row i has value[offsets[i] : offsets[i + 1]] at the same places of `column`. It is square, of V items."""

    offsets: Int
    """int64 [V + 1]."""
    column: Int
    """int64 [E], ascending in each row."""
    value: Floats
    """float64 [E]."""

    def cells(self, rows: Int) -> tuple[Int, Int]:
        """Places in `column` and `value` of some rows [n], concatenated, and the number of each row's entries [n]."""
        begin = self.offsets[rows]
        count = self.offsets[rows + 1] - begin
        return ranges(begin, count), count

    def weighted_sum(self, rows: Int, weight: Floats) -> Floats:
        """Sum of rows [n] with weights [n]: float64 [V]."""
        place, count = self.cells(rows)
        values = self.value[place] * np.repeat(weight, count)
        total: Floats = np.bincount(self.column[place], values, len(self.offsets) - 1).astype(np.float64, copy=False)
        return total


def transition_counts(events: VisibleEvents, num_items: int) -> SparseRows:
    """How often item j came right after item i in one history: row i, column j."""
    follows = np.flatnonzero(np.diff(events.row) == 0)
    return _counted(events.item[follows] * num_items + events.item[follows + 1], num_items)


def co_occurrences(events: VisibleEvents, num_items: int, reach: int) -> SparseRows:
    """How often two different items lie at most `reach` events apart in one history; symmetric."""
    pairs = []
    for lag in range(1, reach + 1):
        one, other = events.item[:-lag], events.item[lag:]
        near = (events.row[:-lag] == events.row[lag:]) & (one != other)
        pairs.append(np.minimum(one, other)[near] * num_items + np.maximum(one, other)[near])
    key, times = np.unique(np.concatenate(pairs), return_counts=True)
    low, high = np.divmod(key, num_items)
    key = np.concatenate([key, high * num_items + low])
    order = np.argsort(key, kind="stable")
    return _packed(key[order], np.concatenate([times, times])[order], num_items)


def _counted(key: Int, num_items: int) -> SparseRows:
    return _packed(*np.unique(key, return_counts=True), num_items)


def _packed(key: Int, times: Int, num_items: int) -> SparseRows:
    """From ascending keys row * V + column."""
    row, column = np.divmod(key, num_items)
    return SparseRows(np.searchsorted(row, np.arange(num_items + 1)), column, times.astype(np.float64))
