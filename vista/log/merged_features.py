"""Features of a log's items or users, merged over its segments: the newest row counts, column by column. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.errors import LogFormatError
from vista.log.histories import ColumnValues, PackedTable, RowColumn, RowFeatures, ranges
from vista.log.item_features import (
    USERS,
    CategoryColumn,
    FeatureColumn,
    FeatureOwner,
    NumberColumn,
    VectorColumn,
    feature_line,
)
from vista.log.segment import Segment, SegmentColumn
from vista.log.segment_files import REMEDY
from vista.log.vocabulary import Vocabulary


def merged_features(segments: Sequence[Segment], owner: FeatureOwner, num_rows: int) -> dict[str, FeatureColumn]:
    """Features of all items or users by column; empty if no segment has any. Reads and verifies their files.

    Args:
        segments: oldest first.
        owner: items or users.
        num_rows: how many the log has.

    Raises:
        LogFormatError: if a file is damaged, or a column is not of one kind.
    """
    for segment in segments:
        segment.files.verify_features(owner)
    rows = np.arange(num_rows)
    return {name: merged_column(parts, rows) for name, parts in declared_columns(segments, owner).items()}


def declared_columns(segments: Sequence[Segment], owner: FeatureOwner) -> dict[str, list[SegmentColumn]]:
    """The segments' columns by name, oldest first, in the order in which the names first occur.

    Raises:
        LogFormatError: if a column is not of one kind, its vectors are not of one length, or rows or offsets are not
            ascending.
    """
    declared: dict[str, list[SegmentColumn]] = {}
    for segment in segments:
        features = segment.features_of(owner)
        if features is None:
            continue
        features.check_order(segment.path)
        for name, column in features.columns.items():
            parts = declared.setdefault(name, [])
            if parts and form_of(parts[0].column) != form_of(column):
                raise LogFormatError(
                    f"{segment.path}: column {name!r} of the {owner.name} features is a {form_of(column)}, but in an "
                    f"earlier segment it is a {form_of(parts[0].column)}; {REMEDY}"
                )
            parts.append(SegmentColumn(features.rows, column))
    return declared


def form_of(column: FeatureColumn) -> str:
    """What stays the same in all segments of a log: the kind, and the length of vectors."""
    return f"vector of {column.vectors.shape[1]} numbers" if isinstance(column, VectorColumn) else column.kind


def rows_with_features(segments: Sequence[Segment], owner: FeatureOwner) -> Int:
    """Rows of the items or users that have features in any segment: int64, ascending."""
    rows = [features.rows for segment in segments if (features := segment.features_of(owner)) is not None]
    return np.unique(np.concatenate([np.empty(0, np.int64), *rows]))


def merged_column(parts: Sequence[SegmentColumn], rows: Int) -> FeatureColumn:
    """Features of the rows int64 [n] in one column, each from the newest part that has the row.

    The time depends on n, but hardly on the size of the parts.

    Args:
        parts: of one kind, oldest first, at least one.

    Returns:
        The column of n rows, a view if it equals the only part.

    Raises:
        LogFormatError: if a code has no value.
    """
    if len(parts) == 1 and np.array_equal(parts[0].rows, rows):
        merged = parts[0].column
    else:
        merged = _merged([part.column for part in parts], _places(parts, rows))
    if isinstance(merged, CategoryColumn) and len(merged.codes):
        low, high = int(merged.codes.min()), int(merged.codes.max())
        if low < 0 or high >= len(merged.values):
            raise LogFormatError(
                f"features of items or users: codes {low} to {high} for {len(merged.values)} values; {REMEDY}"
            )
    return merged


def _places(parts: Sequence[SegmentColumn], rows: Int) -> list[Int]:
    """Per part, where it has each row: int64 [n]; -1 if it does not, or a newer part has it."""
    places: list[Int] = []
    taken = np.zeros(len(rows), np.bool_)
    for part in reversed(parts):
        if not len(part.rows):
            places.append(np.full(len(rows), -1))
            continue
        at = np.minimum(np.searchsorted(part.rows, rows), len(part.rows) - 1)
        mine = (part.rows[at] == rows) & ~taken
        taken |= mine
        places.append(np.where(mine, at, -1))
    return places[::-1]


def _merged(columns: Sequence[FeatureColumn], places: Sequence[Int]) -> FeatureColumn:
    num = len(places[0])
    numbers = [column for column in columns if isinstance(column, NumberColumn)]
    vectors = [column for column in columns if isinstance(column, VectorColumn)]
    if numbers:
        out = np.full(num, np.nan, np.float32)
        for number, place in zip(numbers, places, strict=True):
            out[place >= 0] = number.numbers[place[place >= 0]]
        return NumberColumn(out)
    if vectors:
        out = np.full((num, vectors[0].vectors.shape[1]), np.nan, np.float32)
        for vector, place in zip(vectors, places, strict=True):
            out[place >= 0] = vector.vectors[place[place >= 0]]
        return VectorColumn(out)
    categories = [column for column in columns if isinstance(column, CategoryColumn)]
    chosen = [category.select(place) for category, place in zip(categories, places, strict=True)]
    offsets = offsets_of(sum((np.diff(part.offsets) for part in chosen), np.zeros(num, np.int64)))
    codes = np.empty(int(offsets[-1]), np.int32)
    for part in chosen:
        codes[ranges(offsets[:-1], np.diff(part.offsets))] = part.codes
    return CategoryColumn(Vocabulary.concatenated([part.values for part in chosen]), codes, offsets)


# Features of events and impressions, over the segments of a log. NumPy only.

_NewValues = Mapping[str, list[Vocabulary] | None]
"""By name of a column, in the order in which the segments first have it: what each adds to a category."""


def with_row_features(segments: Sequence[Segment]) -> list[Segment]:
    """The segments with all columns of the log in each. Those that a segment lacks are missing in all of its rows.

    Args:
        segments: oldest first.

    Raises:
        LogFormatError: if a column is not of one kind.
    """
    of_events, of_requests = _event_columns(segments), _request_columns(segments)
    return [
        replace(
            segment,
            events=_completed(segment.events, of_events),
            impressions=None if segment.impressions is None else _completed(segment.impressions, of_requests),
        )
        for segment in segments
    ]


def event_values(segments: Sequence[Segment]) -> ColumnValues:
    """The values of the columns of all events: those that the segments add, end to end. Codes are their rows."""
    return _concatenated(_event_columns(segments))


def request_values(segments: Sequence[Segment]) -> ColumnValues:
    """The values of the columns of all impressions, likewise."""
    return _concatenated(_request_columns(segments))


def _event_columns(segments: Sequence[Segment]) -> _NewValues:
    return _declared(segments, lambda segment: segment.event_values, "events")


def _request_columns(segments: Sequence[Segment]) -> _NewValues:
    return _declared(segments, lambda segment: segment.request_values, "impressions")


def _declared(segments: Sequence[Segment], values_of: Callable[[Segment], ColumnValues], table: str) -> _NewValues:
    declared: dict[str, list[Vocabulary] | None] = {}
    for segment in segments:
        for name, values in values_of(segment).items():
            added = declared.setdefault(name, None if values is None else [])
            if (added is None) != (values is None):
                kinds = ("category", "number") if values is None else ("number", "category")
                raise LogFormatError(
                    f"{segment.path}: column {name!r} of the {table} is a {kinds[1]}, but in an earlier segment it is "
                    f"a {kinds[0]}; {REMEDY}"
                )
            if added is not None and values is not None:
                added.append(values)
    return declared


def _concatenated(columns: _NewValues) -> ColumnValues:
    return {name: None if added is None else Vocabulary.concatenated(added) for name, added in columns.items()}


def _completed(table: PackedTable, columns: _NewValues) -> PackedTable:
    """The table with all of these columns. Those that it lacks take no memory."""
    num_rows = table.num_rows + table.num_deleted
    features = {
        name: table.features[name]
        if name in table.features
        else np.broadcast_to(np.float32(np.nan) if added is None else np.int8(-1), num_rows)
        for name, added in columns.items()
    }
    return replace(table, features=features)


@dataclass(frozen=True, slots=True)
class UserFeatureParts:
    """The columns of user features in each segment."""

    values: ColumnValues
    columns: Mapping[str, Sequence[SegmentColumn]]
    """By name, oldest segment first."""

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> UserFeatureParts:
        """Those of a log. Reads and verifies the files of user features.

        Raises:
            LogFormatError: if a file is damaged, or a column is not of one kind, or is not of a kind that users have.
        """
        for segment in segments:
            segment.files.verify_features(USERS)
        columns = declared_columns(segments, USERS)
        values: dict[str, Vocabulary | None] = {}
        for name, parts in columns.items():
            if not all(_has_one_value(part) for part in parts):
                raise LogFormatError(
                    f"{segments[0].path.parent}: column {name!r} of the user features does not hold one number or "
                    f"category per user; {REMEDY}"
                )
            known = [part.column.values for part in parts if isinstance(part.column, CategoryColumn)]
            values[name] = Vocabulary.concatenated(known) if known else None
        return cls(values, columns)

    def rows(self, users: Int) -> RowFeatures:
        """Features of users int64 [B], rows of the log.

        Raises:
            LogFormatError: if a code has no value.
        """
        rows: dict[str, RowColumn] = {}
        for name, parts in self.columns.items():
            column = merged_column(parts, users)
            assert not isinstance(column, VectorColumn)  # by `of`
            rows[name] = column.numbers if isinstance(column, NumberColumn) else _codes(column)
        return RowFeatures(rows)


def _has_one_value(part: SegmentColumn) -> bool:
    """Whether no user has several values, or a vector."""
    if isinstance(part.column, CategoryColumn):
        return int(np.diff(part.column.offsets).max(initial=0)) <= 1
    return isinstance(part.column, NumberColumn)


def _codes(column: CategoryColumn) -> NDArray[np.int32]:
    """The code of each user int32 [N]; -1 where it is missing."""
    codes = np.full(len(column.offsets) - 1, -1, np.int32)
    codes[column.is_known] = column.codes
    return codes


@dataclass(frozen=True, slots=True)
class UserFeatures:
    """Features of all users of a log, in the order of its vocabulary; no columns without any."""

    values: ColumnValues
    rows: RowFeatures

    @classmethod
    def of(cls, segments: Sequence[Segment], num_users: int) -> UserFeatures:
        """Those of a log. Reads and verifies the files of user features.

        Raises:
            LogFormatError: if a file is damaged, or a column is not of one kind, or is not of a kind that users have.
        """
        parts = UserFeatureParts.of(segments)
        return cls(parts.values, parts.rows(np.arange(num_users)))

    def described(self) -> list[str]:
        """A line per column: its name, kind, and size, and the share of users that have a value."""
        return [
            feature_line(name, "number", 1, float((~np.isnan(self.rows.columns[name])).mean()), USERS.table)
            if known is None
            else feature_line(name, "category", len(known), float((self.rows.columns[name] >= 0).mean()), USERS.table)
            for name, known in self.values.items()
        ]
