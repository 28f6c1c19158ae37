"""Tables of rows packed by user, some of which may have been deleted after they were written. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.log.row_features import RowColumn, RowFeatures


@dataclass(frozen=True, slots=True)
class PackedTable:
    """Rows of several users, concatenated. Row numbers count remaining rows; columns still contain deleted ones.

    Args:
        users: int64 [U] user rows, ascending.
        offsets: int64 [U + 1], where each user's rows start.
        columns: arrays with one entry per row, including deleted rows.
        features: likewise, by name: float32 numbers, or the codes of a category in any signed integer type.
        deleted_at: int64 [R], ascending: the number of remaining rows before each deleted row; None without any.
    """

    users: Int
    offsets: Int
    columns: dict[str, NDArray[Any]]
    features: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    deleted_at: Int | None = None

    @property
    def num_rows(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_deleted(self) -> int:
        return 0 if self.deleted_at is None else len(self.deleted_at)

    def locate(self, rows: Int) -> tuple[Int, Int]:
        """First row and number of rows of each user in `rows` [B]; both int64 [B]."""
        if not len(self.users):
            return np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        at: Int
        if int(self.users[-1]) == len(self.users) - 1:  # users 0..U-1, all present
            present = rows < len(self.users)
            at = np.where(present, rows, 0)
        else:
            at = np.minimum(np.searchsorted(self.users, rows), len(self.users) - 1).astype(np.int64)
            present = self.users[at] == rows
        starts = np.where(present, self.offsets[at], 0)
        return starts, np.where(present, self.offsets[at + 1] - starts, 0)

    def counts(self, num_users: int) -> Int:
        """Number of rows per user: int64 [num_users]."""
        counts = np.zeros(num_users, np.int64)
        counts[self.users] = np.diff(self.offsets)
        return counts

    def places(self, rows: Int) -> Int:
        """Indices into the columns of rows (int64 [N], in any order)."""
        return rows if self.deleted_at is None else rows + np.searchsorted(self.deleted_at, rows, side="right")

    def span(self, first: int, end: int) -> slice | Int:
        """Indices into the columns of rows first .. end - 1: a slice unless deleted rows lie between them."""
        if self.deleted_at is None or first == end:
            return slice(first, end)
        low, high = np.searchsorted(self.deleted_at, [first, end - 1], side="right").tolist()
        if low == high:
            return slice(first + low, end + low)
        gaps = self.deleted_at[low:high] + np.arange(low, high) - (first + low)
        return np.delete(np.arange(first + low, end + high), gaps)

    def features_at(self, index: slice | Int) -> RowFeatures:
        """Features at an index into the columns; views if it is a slice and codes are stored as int32."""
        return RowFeatures({name: _widened(column[index]) for name, column in self.features.items()})

    def first_since(self, low: Int, high: Int, times: Int) -> Int:
        """The first of rows low[i] .. high[i] - 1 (of one user) at times[i] or later, or else high[i]: int64 [N]."""
        column = self.columns["timestamp"]
        low, high = low.copy(), high.copy()
        while (open_ := np.flatnonzero(low < high)).size:  # all binary searches at once
            middle = (low[open_] + high[open_]) // 2
            older = column[self.places(middle)] < times[open_]
            low[open_] = np.where(older, middle + 1, low[open_])
            high[open_] = np.where(older, high[open_], middle)
        return low

    def without(self, places: Int) -> PackedTable:
        """This table, which has no deleted rows yet, without the rows at `places` (int64, ascending, distinct)."""
        if not len(places):
            return self
        offsets = self.offsets - np.searchsorted(places, self.offsets)
        return replace(self, offsets=offsets, deleted_at=places - np.arange(len(places)))

    def of_users(self, begin: int, end: int) -> PackedTable:
        """The remaining rows of users begin .. end - 1, renumbered from 0; views unless rows were deleted."""
        low, high = np.searchsorted(self.users, [begin, end]).tolist()
        first = int(self.offsets[low])
        span = self.span(first, int(self.offsets[high]))
        columns = {name: column[span] for name, column in self.columns.items()}
        features = {name: column[span] for name, column in self.features.items()}
        return PackedTable(self.users[low:high] - begin, self.offsets[low : high + 1] - first, columns, features)


def _widened(column: NDArray[Any]) -> RowColumn:
    return column if column.dtype.kind == "f" else column.astype(np.int32, copy=False)
