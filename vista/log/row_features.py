"""Features of the rows of a table, such as a log's events: one value per row and column. NumPy only.

N rows. A column has one of two kinds: a *category*, such as a device, or a *number*, such as a dwell time. Features of
items, which can have several values, or vectors, are in `vista.log.item_features`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s
from vista.log.vocabulary import Vocabulary

RowColumn: TypeAlias = NDArray[np.int32] | Float32s
"""[N]: int32 codes of a category, -1 where it is missing; or float32 numbers, NaN where they are missing."""
BYTES_WHILE_COPIED = 12
"""Memory of one value while rows are merged, sorted, and written: up to three copies of 4 bytes."""
ColumnValues: TypeAlias = Mapping[str, Vocabulary | None]
"""By name of a column: the distinct values of a category, as text, whose rows are the codes; None for a number."""


@dataclass(frozen=True, slots=True)
class RowFeatures:
    """Features of N rows. A `ColumnValues` with the same names maps the codes to values."""

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
