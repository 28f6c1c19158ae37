"""Categories of items, from a table beside the log: what SIM's hard search goes by."""

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
    """Codes int64 [1 + V] of the categories of a model's items, from 1 on; 0 where the table names none.

    Args:
        file: Parquet, or CSV with a header: the column `item` of ids, and `column`, integers or text; a row an item.
        items: the model's vocabulary; row r of it is place r + 1.

    Raises:
        DataError: naming file, column, row and remedy, if it is not that, or knows none of the items.
    """
    try:
        table = pl.read_csv(file, infer_schema=False) if file.suffix == ".csv" else pl.read_parquet(file, glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"data.item_categories={file}: unreadable ({reason}); name a Parquet or CSV file") from error
    for name in ("item", column):
        if name not in table.columns:
            raise DataError(
                f"{file}: column {name!r} is missing, it has {', '.join(table.columns)}; rename the column of ids to "
                "item, and name that of categories with data.category_column=…"
            )
        kind = table[name].dtype
        if not (kind.is_integer() or kind in (pl.String, pl.Categorical, pl.Boolean)):
            raise DataError(f"{file}: column {name!r} is {kind}; write integers or text, one value an item")
    wanted = pl.Int64 if items.kind == "int" else pl.String
    ids = table["item"].cast(wanted, strict=False)
    bad = table["item"].is_not_null() & ids.is_null()
    if bad.any():
        row = int(bad.arg_true()[0])
        raise DataError(
            f"{file}: row {row + 1}, column 'item': {table['item'][row]!r} is no integer, as items here are"
        )
    named = pl.DataFrame({"item": ids, "category": table[column].cast(pl.String)}).drop_nulls().unique()
    twice = named.filter(named["item"].is_duplicated())
    if len(twice):
        item = twice["item"].min()
        found = sorted(twice.filter(pl.col("item") == item)["category"])
        raise DataError(f"{file}: item {item!r} has the categories {', '.join(found)}; leave one")
    if not len(named):
        raise DataError(
            f"{file}: column {column!r} has no value beside an id; name another with data.category_column=…"
        )
    rows = items.rows(named["item"].to_list())
    logger.info("%s: %d of %d items have a category", file, int((rows >= 0).sum()), len(items))
    if not (rows >= 0).any():
        raise DataError(f"{file}: column 'item' has none of the log's items; are these its ids?")
    codes = np.zeros(1 + len(items), np.int64)
    codes[rows[rows >= 0] + 1] = named["category"].rank("dense").to_numpy()[rows >= 0]
    return codes
