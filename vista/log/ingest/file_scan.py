"""The rows of a source file before their values are parsed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vista.installation import require_module

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

ROW, EXTRA = "row", "extra"


@dataclass(frozen=True, slots=True)
class FileScan:
    """The rows of a file as a lazy frame.

    frame: columns with raw values, ROW, and (of a text file) EXTRA; columns: their names to those in the file; is_text:
    whether values are text to parse; time_unit: unit of numeric and text timestamps.
    """

    frame: pl.LazyFrame
    columns: Mapping[str, str]
    is_text: bool
    time_unit: str | None = None
