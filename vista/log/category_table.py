"""Reading of a table of items' categories, in the process that parses source files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vista.errors import DataError, shown
from vista.installation import require_module

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")


def category_table(file: Path, column: str, kind: str) -> pl.DataFrame:
    """The distinct pairs of item and category: columns `item` (int64 or text) and `category` (text).

    Args:
        file: Parquet, or CSV with a header, with a column `item` of ids.
        column: name of the column of categories, integers or text.
        kind: "int" or "str", the kind of the log's item ids.

    Raises:
        DataError: naming file, column, row, and remedy, if the file is invalid.
    """
    try:
        lazy = (
            pl.scan_csv(file, infer_schema=False, glob=False)
            if file.suffix == ".csv"
            else pl.scan_parquet(file, glob=False)
        )
        schema = lazy.collect_schema()
        for name in ("item", column):
            if name not in schema:
                raise DataError(
                    f"{file}: column {name!r} is missing, the file has: {', '.join(schema)}; name the column of ids "
                    "item, and set the column of categories with data.category_column=..."
                )
            dtype = schema[name]
            if not (dtype.is_integer() or dtype in (pl.String, pl.Categorical, pl.Boolean)):
                raise DataError(f"{file}: column {name!r} has type {dtype}; write integers or text, one value per item")
        table = lazy.select("item", pl.col(column).alias("category")).collect(engine="streaming")
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"data.item_categories={file}: cannot be read ({reason}); name a Parquet or CSV file"
        ) from error
    ids = table["item"].cast(pl.Int64 if kind == "int" else pl.String, strict=False)
    bad = table["item"].is_not_null() & ids.is_null()
    if bad.any():
        row = int(bad.arg_true()[0])
        raise DataError(
            f"{file}: row {row + 1}, column 'item': {shown(table['item'][row])} is not an integer, but the log's item "
            "ids are; use the log's ids"
        )
    named = pl.DataFrame({"item": ids, "category": table["category"].cast(pl.String)}).drop_nulls().unique()
    twice = named.filter(named["item"].is_duplicated())
    if len(twice):
        item = twice["item"].min()
        categories = sorted(twice.filter(pl.col("item") == item)["category"])
        raise DataError(f"{file}: item {shown(item)} has the categories {', '.join(categories)}; keep one")
    if not len(named):
        raise DataError(f"{file}: column {column!r} has no values; set another column with data.category_column=...")
    return named
