"""Columns of a text file that may be categories or numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vista.errors import DataError, shown
from vista.installation import require_module
from vista.log.ingest.scanned_source import ScannedSource, unreadable

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

_NUMBER = r"^[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?$"
"""A number as programs write it. Text with leading zeros, such as a postal code, is not."""


def refuse_numbers(source: ScannedSource, rows: pl.LazyFrame, table: str) -> None:
    """Refuse a text file with a column of only numbers, which has to be named as categories or numbers.

    Args:
        rows: of the file, with the text of each column.
        table: for the error, such as items.

    Raises:
        DataError: naming the column and a value.
    """
    columns = [name for name in source.columns if name.startswith("category:")]
    given = rows.select(columns)
    is_number = pl.all().str.contains(_NUMBER)
    only_numbers = given.select(is_number.all(ignore_nulls=True) & pl.all().is_not_null().any())
    try:
        found = only_numbers.collect(engine="streaming").row(0, named=True)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise unreadable(source, error) from error
    for column, has_only_numbers in found.items():
        if has_only_numbers:
            value = given.select(pl.col(column).drop_nulls().first()).collect(engine="streaming").item()
            raise DataError(
                f"{source.path}: column {source.columns[column]!r} has only numbers, such as {shown(value)}, and "
                f"could be categories or numbers; list all columns to read, this one under {table}.categories or "
                f"{table}.numbers"
            )
