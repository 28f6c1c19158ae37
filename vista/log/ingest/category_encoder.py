"""Categories of events and impressions in a part: its rows have codes, and a file per column has the values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vista.errors import DataError
from vista.installation import require_module
from vista.log.ingest.sources import Source

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

VALUE = "value"
"""Column of a file of values, whose rows are the codes of a part."""
_FIRST_ROWS, _MORE_ROWS = 100_000, 2_000_000
"""Rows that are looked at for a column with far too many values: all columns first, then those with many values."""
MARGIN = 1.25
"""Estimates of the number of values are closer than this factor."""


class CategoryEncoder:
    """Replaces the text of categories by uint32 codes, in the order in which threads meet the values.

    Args:
        columns: canonical columns to encode.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._categories = {column: pl.Categories.random() for column in columns}
        # Polars forgets the values of a type that no series has.
        self._kept = [pl.Series([], dtype=pl.Categorical(known)) for known in self._categories.values()]

    def encoded(self, rows: pl.LazyFrame) -> pl.LazyFrame:
        """The rows with codes in place of text, null where it is missing."""
        return rows.with_columns(
            pl.col(column).cast(pl.Categorical(known)).to_physical() for column, known in self._categories.items()
        )

    def save_values(self, stem: Path) -> dict[str, Path]:
        """Write the values, once all rows are encoded; returns the file of each column."""
        files = {}
        for number, (column, known) in enumerate(self._categories.items()):
            files[column] = stem.with_name(f"{stem.name}-{number}.arrow")
            known.to_series().alias(VALUE).to_frame().write_ipc(files[column])
        return files


def refuse_many_values(rows: pl.LazyFrame, columns: Sequence[str], source: Source, table: str) -> None:
    """Refuse a category with far too many values in the first rows, before all values are held in memory.

    Args:
        rows: with the text of categories.
        source: of the rows.
        table: for the error.

    Raises:
        DataError: naming the column.
    """
    for num_rows, limit in ((_FIRST_ROWS, _FIRST_ROWS // 2), (_MORE_ROWS, source.max_values * MARGIN)):
        if columns:
            counts = rows.head(num_rows).select(pl.col(columns).approx_n_unique()).collect(engine="streaming")
            columns = [column for column, count in counts.row(0, named=True).items() if count > limit]
    for column in columns:
        raise too_many_values(source, table, column.partition(":")[2], f"about {counts[column][0]:,} or more")


def too_many_values(source: Source, table: str, name: str, count: str) -> DataError:
    """The error for a category with this number of values."""
    return DataError(
        f"{source.path}: with column {name!r} the log would have {count} distinct values, but a category may have at "
        f"most {source.max_values:,}; leave it out, merge rare values, or, for a category that the model hashes "
        f"(model.hashed_features), raise {table}.max_values"
    )
