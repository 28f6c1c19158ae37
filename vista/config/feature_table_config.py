"""What the configurations of tables of features have in common, whether of items or of users."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from vista.config.checks import check_types, require
from vista.config.max_values import MAX_VALUES, check_max_values


@dataclass(kw_only=True, slots=True)
class FeatureTableConfig:
    """Files of a table with one row per item or user, and which of its columns are features.

    If no column is named, every column is read and its type decides: text and booleans are categories, and floats are
    numbers. In Parquet files, integer columns are then refused, because they could be categories or numbers; in CSV and
    TSV files, so are columns of only numbers. Otherwise only the named columns are read.
    """

    table: ClassVar[str]
    """Key of the table in the configuration: items | users."""

    paths: list[str] = field(default_factory=list)
    """Parquet, CSV, or TSV files, or folders of them. Together they are one table."""
    categories: list[str] | None = None
    """Columns of categories: text, integers, or booleans, each with at most `max_values` values. Of items, also lists
    of these."""
    numbers: list[str] | None = None
    """Columns of numbers, such as a price. A number may be missing, but must not be infinite."""
    max_values: int = MAX_VALUES
    """Maximum number of values of a category of this table. Raise it for categories that the model hashes
    (`model.hashed_features`). `vista prepare` holds all values of one category in memory."""
    separator: str = ","
    """Character that separates the columns of text files, such as ';' or tab."""

    def __post_init__(self) -> None:
        check_types(self)
        check_max_values(self.max_values, f"{self.table}.max_values")
        named = [self.id_column, *(column for columns in self.named.values() for column in columns or ())]
        twice = sorted({name for name in named if named.count(name) > 1})
        require(not twice, self.table, f"names the column {', '.join(map(repr, twice))} twice; name each column once")

    @property
    def id_column(self) -> str:
        """The column of ids."""
        raise NotImplementedError

    @property
    def named(self) -> dict[str, list[str] | None]:
        """The columns that are named, by the key that names them."""
        return {"categories": self.categories, "numbers": self.numbers}

    @property
    def is_inferred(self) -> bool:
        """Whether the types of the columns decide which features they are."""
        return all(columns is None for columns in self.named.values())
