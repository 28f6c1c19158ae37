"""Categories of items, from a table next to the log. SIM's hard search uses them."""

from __future__ import annotations

import logging
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vista.errors import DataError
from vista.installation import require_module
from vista.log.ingest.source_parser import SourceParser
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
    if not file.is_file():
        raise DataError(f"data.item_categories={file}: cannot be read (no such file); name a Parquet or CSV file")
    with SourceParser() as parser:
        _, content = parser.call("category_table", file, column=column, kind=items.kind)
    named = require_module("polars", "data").read_ipc(BytesIO(content))
    rows = items.rows(named["item"].to_list())
    logger.info("%s: %d of %d items have a category", file, int((rows >= 0).sum()), len(items))
    if not (rows >= 0).any():
        raise DataError(f"{file}: column 'item' contains none of the log's items; use the log's ids")
    codes = np.zeros(1 + len(items), np.int64)
    codes[rows[rows >= 0] + 1] = named["category"].rank("dense").to_numpy()[rows >= 0]
    return codes
