"""Categories of items, from a table next to the log. SIM's hard search uses them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vista.errors import DataError
from vista.log.polars_extra import pl
from vista.log.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


def read_categories(file: Path, column: str, items: Vocabulary) -> NDArray[np.int64]:
    """Category codes of a model's items: int64 [1 + V], starting at 1; 0 for items without a category.

    Args:
        file: Parquet, or CSV with a header, one row per item, with a column `item` of ids.
        column: name of the column of categories, integers or text.
        items: vocabulary of the model; its row r has index r + 1 in the result.

    Raises:
        DataError: naming file, column, row, and remedy, if the file is invalid or contains no item of the model.
    """
    try:
        table = pl.read_csv(file, infer_schema=False) if file.suffix == ".csv" else pl.read_parquet(file, glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"data.item_categories={file}: cannot be read ({reason}); name a Parquet or CSV file"
        ) from error
    for name in ("item", column):
        if name not in table.columns:
            raise DataError(
                f"{file}: column {name!r} is missing, the file has: {', '.join(table.columns)}; name the column of ids "
                "item, and set the column of categories with data.category_column=..."
            )
        kind = table[name].dtype
        if not (kind.is_integer() or kind in (pl.String, pl.Categorical, pl.Boolean)):
            raise DataError(f"{file}: column {name!r} has type {kind}; write integers or text, one value per item")
    wanted = pl.Int64 if items.kind == "int" else pl.String
    ids = table["item"].cast(wanted, strict=False)
    bad = table["item"].is_not_null() & ids.is_null()
    if bad.any():
        row = int(bad.arg_true()[0])
        raise DataError(
            f"{file}: row {row + 1}, column 'item': {table['item'][row]!r} is not an integer, but the log's item ids "
            "are; use the log's ids"
        )
    named = pl.DataFrame({"item": ids, "category": table[column].cast(pl.String)}).drop_nulls().unique()
    twice = named.filter(named["item"].is_duplicated())
    if len(twice):
        item = twice["item"].min()
        categories = sorted(twice.filter(pl.col("item") == item)["category"])
        raise DataError(f"{file}: item {item!r} has the categories {', '.join(categories)}; keep one")
    if not len(named):
        raise DataError(f"{file}: column {column!r} has no values; set another column with data.category_column=...")
    rows = items.rows(named["item"].to_list())
    logger.info("%s: %d of %d items have a category", file, int((rows >= 0).sum()), len(items))
    if not (rows >= 0).any():
        raise DataError(f"{file}: column 'item' contains none of the log's items; use the log's ids")
    codes = np.zeros(1 + len(items), np.int64)
    codes[rows[rows >= 0] + 1] = named["category"].rank("dense").to_numpy()[rows >= 0]
    return codes
