"""Configuration of a table of item features."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import check_types, require


@dataclass(kw_only=True, slots=True)
class ItemTableConfig:
    """Files of a table with one row per item, and which of its columns are features.

    If `categories`, `numbers`, and `vectors` are all null, every column is read and its type decides: text, booleans,
    and lists of text are categories, floats are numbers, and lists of floats are vectors. In Parquet files, integer
    columns are then refused, because they could be categories or numbers. In CSV and TSV files, every column counts as
    text and becomes a category, so name the columns. Otherwise only the named columns are read.
    """

    paths: list[str] = field(default_factory=list)
    """Parquet, CSV, or TSV files, or folders of them. Together they are one table."""
    item: str = "item"
    """Column of item ids. Items that the log does not contain are left out."""
    categories: list[str] | None = None
    """Columns of categories: text, integers, booleans, or lists of these, each with at most 1,000,000 values."""
    numbers: list[str] | None = None
    """Columns of numbers, such as a price. A number may be missing, but must not be infinite."""
    vectors: list[str] | None = None
    """Columns of vectors, such as embeddings: lists of numbers, all of one length. In a text file, the numbers are
    separated by spaces or commas."""
    separator: str = ","
    """Character that separates the columns of text files, such as ';' or tab."""
    value_separator: str | None = None
    """Text that separates the values of a category, such as '|' in Comedy|Drama. null reads one value."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.value_separator != "", "items.value_separator", "must not be empty; use null for one value")
        named = [self.item, *(self.categories or []), *(self.numbers or []), *(self.vectors or [])]
        twice = sorted({name for name in named if named.count(name) > 1})
        require(not twice, "items", f"names the column {', '.join(map(repr, twice))} twice; name each column once")

    @property
    def is_inferred(self) -> bool:
        """Whether the types of the columns decide which features they are."""
        return self.categories is None and self.numbers is None and self.vectors is None
