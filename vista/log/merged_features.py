"""Features of a log's items or users, merged over its segments: the newest row counts, column by column. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vista.arrays import Int, offsets_of
from vista.errors import LogFormatError
from vista.log.feature_owner import FeatureOwner
from vista.log.histories import ranges
from vista.log.item_features import CategoryColumn, FeatureColumn, NumberColumn, VectorColumn
from vista.log.segment import Segment
from vista.log.segment_features import SegmentColumn
from vista.log.segment_manifest import REMEDY
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
