"""Configuration of a table of item features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vista.config.checks import require
from vista.config.feature_table_config import FeatureTableConfig


@dataclass(kw_only=True, slots=True)
class ItemTableConfig(FeatureTableConfig):
    """Files of a table with one row per item, and which of its columns are features.

    If no column is named, lists of text are categories too, and lists of floats are vectors.
    """

    table: ClassVar[str] = "items"

    item: str = "item"
    """Column of item ids. Items that the log does not contain are left out."""
    vectors: list[str] | None = None
    """Columns of vectors, such as embeddings: lists of numbers, all of one length. In a text file, the numbers are
    separated by spaces or commas."""
    value_separator: str | None = None
    """Text that separates the values of a category, such as '|' in Comedy|Drama. null reads one value."""

    def __post_init__(self) -> None:
        FeatureTableConfig.__post_init__(self)
        require(self.value_separator != "", "items.value_separator", "must not be empty; use null for one value")

    @property
    def id_column(self) -> str:
        return self.item

    @property
    def named(self) -> dict[str, list[str] | None]:
        return {"categories": self.categories, "numbers": self.numbers, "vectors": self.vectors}
