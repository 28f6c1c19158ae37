"""Features of a log's users, merged over its segments. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.errors import LogFormatError
from vista.log.feature_owner import USERS
from vista.log.item_features import CategoryColumn, NumberColumn, feature_line
from vista.log.merged_features import merged_features
from vista.log.row_features import ColumnValues, RowColumn, RowFeatures
from vista.log.segment import Segment
from vista.log.segment_manifest import REMEDY
from vista.log.vocabulary import Vocabulary


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
        values: dict[str, Vocabulary | None] = {}
        rows: dict[str, RowColumn] = {}
        for name, column in merged_features(segments, USERS, num_users).items():
            if isinstance(column, NumberColumn):
                values[name], rows[name] = None, column.numbers
            elif isinstance(column, CategoryColumn) and int(np.diff(column.offsets).max(initial=0)) <= 1:
                values[name], rows[name] = column.values, _codes(column)
            else:
                raise LogFormatError(
                    f"{segments[0].path.parent}: column {name!r} of the user features does not hold one number or "
                    f"category per user; {REMEDY}"
                )
        return cls(values, RowFeatures(rows))

    def described(self) -> list[str]:
        """A line per column: its name, kind, and size, and the share of users that have a value."""
        return [
            feature_line(name, "number", 1, float((~np.isnan(self.rows.columns[name])).mean()), USERS.table)
            if known is None
            else feature_line(name, "category", len(known), float((self.rows.columns[name] >= 0).mean()), USERS.table)
            for name, known in self.values.items()
        ]


def _codes(column: CategoryColumn) -> NDArray[np.int32]:
    """The code of each user int32 [N]; -1 where it is missing."""
    codes = np.full(len(column.offsets) - 1, -1, np.int32)
    codes[column.is_known] = column.codes
    return codes
