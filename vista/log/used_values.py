"""The values of categories that rows still have after deletions. NumPy only.

A value that only erased users had may identify them, so a compaction removes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.log.packed_table import PackedTable
from vista.log.row_features import ColumnValues, RowColumn, RowFeatures
from vista.log.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class UsedValues:
    """The values that rows have.

    values: by name of a column; codes: of the categories that lost values, int32 [V + 1], the code in `values` of each
    of the V values before, or -1, and then -1 for a row without a value.
    """

    values: ColumnValues
    codes: Mapping[str, NDArray[np.int32]]

    @classmethod
    def of(cls, tables: Sequence[PackedTable], values: ColumnValues, rows_at_once: int) -> UsedValues:
        """The values of the remaining rows of tables.

        Args:
            values: of the columns of the tables.
            rows_at_once: rows that are read at once; it never changes the result.
        """
        left, codes = dict(values), {}
        if any(table.num_deleted for table in tables):
            for name, known in values.items():
                if known is None:
                    continue
                used = np.zeros(len(known) + 1, np.bool_)
                for table in tables:
                    for start in range(0, table.num_rows, rows_at_once):
                        used[table.features[name][table.span(start, min(start + rows_at_once, table.num_rows))]] = True
                rows = np.flatnonzero(used[:-1])
                if len(rows) < len(known):
                    texts = known.ids(rows).tolist()
                    left[name] = remaining = Vocabulary.empty("str").extended(texts)
                    codes[name] = np.full(len(used), -1, np.int32)
                    codes[name][rows] = remaining.rows(texts)
        return cls(left, codes)

    def recoded(self, features: RowFeatures) -> RowFeatures:
        """Features of rows with codes of `values`."""
        columns: dict[str, RowColumn] = dict(features.columns)
        for name, code in self.codes.items():
            columns[name] = code[columns[name].astype(np.int64)]
        return RowFeatures(columns)
