"""Features of a log's users, merged over its segments. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vista.log.feature_owner import USERS
from vista.log.item_features import feature_line
from vista.log.row_features import ColumnValues, RowFeatures
from vista.log.segment import Segment
from vista.log.user_feature_parts import UserFeatureParts


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
