"""Packed histories, and how they are read from one or several packed tables. NumPy only."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Int, offsets_of
from vista.log.vocabulary import Vocabulary

RowColumn: TypeAlias = NDArray[np.int32] | Float32s
"""[N]: int32 codes of a category, -1 where it is missing; or float32 numbers, NaN where they are missing."""
BYTES_WHILE_COPIED = 12
"""Memory of one value while rows are merged, sorted, and written: up to three copies of 4 bytes."""
RowArrays: TypeAlias = dict[str, NDArray[Any]]
"""By name: arrays with an entry per row."""
ColumnValues: TypeAlias = Mapping[str, Vocabulary | None]
"""By name of a column: the distinct values of a category, as text, whose rows are the codes; None for a number."""


@dataclass(frozen=True, slots=True)
class RowFeatures:
    """Features of N rows, such as events: one value per row and column. `ColumnValues` maps the codes to values.

    Features of items, which can have several values, or vectors, are in `features.py`.
    """

    columns: Mapping[str, RowColumn]
    """By name, in the order in which they were declared."""

    def select(self, index: Any) -> RowFeatures:
        """Features of the rows at `index`, as NumPy indexes; views if it is a slice."""
        return RowFeatures({name: column[index] for name, column in self.columns.items()})

    def empty(self, num_rows: int) -> RowFeatures:
        """Columns of the same types for `num_rows` rows, to be filled."""
        columns: dict[str, RowColumn] = {
            name: np.empty_like(part, shape=num_rows) for name, part in self.columns.items()
        }
        return RowFeatures(columns)

    def named(self, values: ColumnValues) -> dict[str, NDArray[Any]]:
        """The values themselves, [N] by name: texts of a category, None where they are missing; numbers as they are.

        Args:
            values: what the codes stand for.
        """
        named: dict[str, NDArray[Any]] = {}
        for name, column in self.columns.items():
            known = values[name]
            if known is None:
                named[name] = column
                continue
            named[name] = np.full(len(column), None, object)
            is_known = np.flatnonzero(column >= 0)
            named[name][is_known] = known.ids(column[is_known])
        return named

    @classmethod
    def missing(cls, values: ColumnValues, num_rows: int) -> RowFeatures:
        """Rows without any value."""
        return cls(
            {
                name: np.full(num_rows, np.nan, np.float32) if known is None else np.full(num_rows, -1, np.int32)
                for name, known in values.items()
            }
        )


def rows_that_fit(rows: int, row_bytes: int, num_features: int) -> int:
    """How many rows with features take the memory of `rows` rows without any, at least 1.

    Args:
        row_bytes: memory of a row without features.
        num_features: number of columns of features.
    """
    return max(1, rows * row_bytes // (row_bytes + BYTES_WHILE_COPIED * num_features))


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
        """This table without further rows at `places` of its columns (int64, ascending, distinct)."""
        before = np.zeros(0, np.int64) if self.deleted_at is None else self.deleted_at + np.arange(len(self.deleted_at))
        places = np.setdiff1d(places, before, assume_unique=True)
        if not len(places):
            return self
        rows = places - np.searchsorted(before, places)
        every = np.union1d(before, places)
        offsets = self.offsets - np.searchsorted(rows, self.offsets)
        return replace(self, offsets=offsets, deleted_at=every - np.arange(len(every)))


def _widened(column: NDArray[Any]) -> RowColumn:
    return column if column.dtype.kind == "f" else column.astype(np.int32, copy=False)


@dataclass(frozen=True, slots=True)
class Histories:
    """Histories of B users, concatenated, oldest event first. Arrays may be read-only views of the log.

    item: int32 [T] item rows of the log; timestamp: int64 [T] milliseconds, or ordinals in a log without times;
    action: uint8 [T] codes into `EventLog.actions`; rating: float32 [T], or None if the log has no ratings; offsets:
    int64 [B + 1]; features: of T rows, with the names of `EventLog.event_features`.
    """

    item: NDArray[np.int32]
    timestamp: Int
    action: NDArray[np.uint8]
    rating: NDArray[np.float32] | None
    offsets: Int
    features: RowFeatures = field(default_factory=lambda: RowFeatures({}))

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_events(self) -> int:
        return int(self.offsets[-1])

    @property
    def lengths(self) -> Int:
        """Number of events per user: int64 [B]."""
        return np.diff(self.offsets)

    @property
    def owner(self) -> Int:
        """Number of the history that each event belongs to: int64 [T]."""
        return np.repeat(np.arange(self.num_users), self.lengths)

    @property
    def age(self) -> Int:
        """Number of later events in each event's history: int64 [T], 0 for the newest event."""
        return np.repeat(self.offsets[1:] - 1, self.lengths) - np.arange(self.num_events)

    def slice(self, user: int, start: int = 0, stop: int | None = None) -> Histories:
        """Events [start, stop) of history number `user`, as views (B = 1), with bounds like a list's."""
        begin, end = int(self.offsets[user]), int(self.offsets[user + 1])
        low, high, _ = slice(start, stop).indices(end - begin)
        return self.at(slice(begin + low, begin + max(low, high)), np.array([0, max(high - low, 0)], np.int64))

    def select_users(self, begin: int, end: int) -> Histories:
        """Histories begin .. end - 1, as views."""
        first, last = int(self.offsets[begin]), int(self.offsets[end])
        return self.at(slice(first, last), self.offsets[begin : end + 1] - first)

    def select(self, starts: Int, stops: Int) -> Histories:
        """Events [starts[b], stops[b]) of each history; returns self if these are all events."""
        counts = stops - starts
        if np.array_equal(counts, self.lengths):
            return self
        offsets = offsets_of(counts)
        return self.at(ranges(self.offsets[:-1] + starts, counts), offsets)

    def at(self, index: builtins.slice | Int, offsets: Int) -> Histories:
        """The events at `index` (views if it is a slice), with new offsets."""
        return Histories(
            self.item[index],
            self.timestamp[index],
            self.action[index],
            None if self.rating is None else self.rating[index],
            offsets,
            self.features.select(index),
        )


def concatenated(parts: Sequence[Histories]) -> Histories:
    """The histories of all parts, end to end; at least one part, all with the same columns of features."""
    columns = parts[0].features.columns
    ratings = [part.rating for part in parts if part.rating is not None]
    return Histories(
        np.concatenate([part.item for part in parts]),
        np.concatenate([np.asarray(part.timestamp) for part in parts]),
        np.concatenate([part.action for part in parts]),
        np.concatenate(ratings) if len(ratings) == len(parts) else None,
        offsets_of(np.concatenate([part.lengths for part in parts])),
        RowFeatures({name: np.concatenate([part.features.columns[name] for part in parts]) for name in columns}),
    )


def ranges(starts: Int | int, counts: Int) -> Int:
    """The integers starts[b] .. starts[b] + counts[b] - 1 of all b, concatenated: int64 [sum of counts]."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    index: Int = np.arange(total, dtype=np.int64) + np.repeat(starts - ends + counts, counts)
    return index


def token_groups(lengths: Int, budget: int) -> Iterator[builtins.slice]:
    """Split histories into runs with at most `budget` events in total; a longer history is a run by itself."""
    ends = np.cumsum(lengths)
    begin = before = 0
    while begin < len(lengths):
        stop = max(begin + 1, int(np.searchsorted(ends, before + budget, side="right")))
        yield builtins.slice(begin, stop)
        begin, before = stop, int(ends[stop - 1])


def take(table: PackedTable, starts: Int, counts: Int) -> tuple[RowArrays, RowFeatures]:
    """Rows starts[b] .. starts[b] + counts[b] - 1 of a table, end to end: views if consecutive, else copies."""
    filled = np.flatnonzero(counts)
    starts, counts = starts[filled], counts[filled]
    index: slice | Int
    if not len(filled):
        index = slice(0, 0)
    elif np.array_equal(starts[1:], starts[:-1] + counts[:-1]):
        index = table.span(int(starts[0]), int(starts[-1] + counts[-1]))
    else:
        index = table.places(ranges(starts, counts))
    return {name: column[index] for name, column in table.columns.items()}, table.features_at(index)


def take_range(tables: Sequence[PackedTable], rows: Int, low: Int, high: Int) -> tuple[RowArrays, RowFeatures, Int]:
    """Rows [low[b], high[b]) of the users `rows` [B] in several tables, by time; equal times in the order of tables.

    They are views if one table has them all and the users are consecutive. If a user's tables follow one another in
    time, only these rows are read; otherwise all of the user's. Bounds must be within what the user has.

    Args:
        tables: with the same features. In the rows of a table that lacks a column of another one, numbers are NaN.

    Returns:
        The columns [T], the features of T rows, and the offsets [B + 1] of the users.
    """
    offsets = offsets_of(high - low)
    if len(tables) == 1:
        first, _ = tables[0].locate(rows)
        return *take(tables[0], first + low, high - low), offsets
    located = [table.locate(rows) for table in tables]
    total = np.stack([count for _, count in located])
    before = np.cumsum(total, axis=0) - total
    in_order = _in_order(tables, located)
    begin = np.where(in_order, np.clip(low - before, 0, total), 0)
    counts = np.where(in_order, np.clip(high - before, 0, total), total) - begin
    used = np.flatnonzero(counts.any(axis=1)).tolist() or [0]
    parts = [take(tables[number], located[number][0] + begin[number], counts[number]) for number in used]
    names = {name: column for table in tables for name, column in table.columns.items()}
    if len(parts) == 1 and len(parts[0][0]) == len(names):
        return *parts[0], offsets
    read = offsets_of(counts.sum(0))
    places, next_free = [], read[:-1].copy()
    for number in used:
        places.append(ranges(next_free, counts[number]))
        next_free += counts[number]
    columns: RowArrays = {}
    features = tables[0].features_at(slice(0, 0)).empty(int(read[-1]))
    for name, like in names.items():
        fill = np.nan if like.dtype.kind == "f" else 0
        columns[name] = np.full((int(read[-1]), *like.shape[1:]), fill, like.dtype)
    for (of_part, features_of_part), place in zip(parts, places, strict=True):
        for name, column in of_part.items():
            columns[name][place] = column
        for name, values in features.columns.items():
            values[place] = features_of_part.columns[name]
    start, stop = np.where(in_order, 0, low), np.where(in_order, high - low, high)
    index = None if np.array_equal(stop - start, np.diff(read)) else ranges(read[:-1] + start, stop - start)
    if not is_by_time(columns["timestamp"], read):
        order = np.lexsort((columns["timestamp"], np.repeat(np.arange(len(rows)), np.diff(read))))
        index = order if index is None else order[index]
    if index is None:
        return columns, features, offsets
    return {name: column[index] for name, column in columns.items()}, features.select(index), offsets


def take_histories(tables: Sequence[PackedTable], rows: Int, low: Int, high: Int) -> Histories:
    """Events of users in several tables, as `take_range`."""
    columns, features, offsets = take_range(tables, rows, low, high)
    named = (columns["item"], columns["timestamp"], columns["action"], columns.get("rating"))
    return Histories(*named, offsets, features)


def _in_order(tables: Sequence[PackedTable], located: Sequence[tuple[Int, Int]]) -> NDArray[np.bool_]:
    """bool [B]: whether each user's tables follow one another in time."""
    in_order = np.ones(len(located[0][0]), np.bool_)
    newest = np.full(len(in_order), np.iinfo(np.int64).min)
    for table, (start, count) in zip(tables, located, strict=True):
        times, has = table.columns["timestamp"], np.flatnonzero(count)
        in_order[has] &= times[table.places(start[has])] >= newest[has]
        newest[has] = np.maximum(newest[has], times[table.places(start[has] + count[has] - 1)])
    return in_order


def is_by_time(timestamp: Int, offsets: Int) -> bool:
    """Whether packed histories with these offsets [B + 1] are each in the order of their times [T]."""
    falls = np.diff(timestamp) < 0
    inner = offsets[1:-1]
    falls[inner[(inner > 0) & (inner < len(timestamp))] - 1] = False  # between users, time may fall
    return not falls.any()


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


def gap_bucket(gap_ms: Int) -> Int:
    """Logarithmic bucket of a time difference.

    Args:
        gap_ms: int64, any shape, milliseconds. Negative differences count as 0.

    Returns:
        int64 of the same shape in [1, NUM_GAPS).
    """
    seconds = np.maximum(gap_ms, 0) / 1000.0
    return np.minimum(1 + np.log2(1.0 + seconds).astype(np.int64), NUM_GAPS - 1)


def history_gaps(timestamp: Int, offsets: Int) -> Int:
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
