"""Files with one JSON object per line: the reviews and the products of Amazon Reviews 2023."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vista.errors import DataError
from vista.installation import require_module
from vista.log.ingest.column_names import check_columns
from vista.log.ingest.file_scan import ROW
from vista.log.ingest.text_files import first_line, scan_text

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")


def scan_json_lines(file: Path, fields: Sequence[str], table: str, remedy: str) -> pl.LazyFrame:
    """Read fields of all objects as text. A line that is not an object has no fields.

    Args:
        table: events | items, for messages.
        remedy: what to do about a file whose first object lacks a field.

    Returns:
        ROW and the fields; a list is JSON text, and null is missing.

    Raises:
        DataError: if the first line is not an object, or lacks a field.
    """
    try:
        first = json.loads(first_line(file))
    except json.JSONDecodeError:
        first = None
    if not isinstance(first, dict):
        raise DataError(f"{file}: line 1 is not a JSON object; {remedy}")
    check_columns(str(file), {field: field for field in fields}, first, table, remedy)
    # A control character separates the columns, because JSON has none outside of line ends.
    lines = scan_text(file, ["line"], "\x1f", None, 0)
    return lines.select(ROW, *(pl.col("line").str.json_path_match(f"$.{field}").alias(field) for field in fields))
