"""Features of a log's users as its segments have them, read for some users at a time. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.errors import LogFormatError
from vista.log.feature_owner import USERS
from vista.log.item_features import CategoryColumn, NumberColumn, VectorColumn
from vista.log.merged_features import declared_columns, merged_column
from vista.log.row_features import ColumnValues, RowColumn, RowFeatures
from vista.log.segment import Segment
from vista.log.segment_features import SegmentColumn
from vista.log.segment_manifest import REMEDY
from vista.log.vocabulary import Vocabulary


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
