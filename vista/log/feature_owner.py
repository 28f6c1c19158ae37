"""The two kinds of rows that a feature table describes: items and users. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class FeatureOwner:
    """What the rows of a table of features belong to."""

    name: str
    """item | user, which is also the canonical column of ids."""
    folder: str
    """Of the files in a segment."""
    field: str
    """Of the columns in a segment's manifest."""

    @property
    def table(self) -> str:
        """Name of the table: in the configuration, among the sources in a manifest, and of the file of rows."""
        return f"{self.name}s"

    @property
    def rows_file(self) -> str:
        """The file of the rows with features, in a segment."""
        return f"{self.folder}{self.table}.npy"


ITEMS: Final = FeatureOwner("item", "features/", "features")
USERS: Final = FeatureOwner("user", "user_features/", "user_features")
OWNERS: Final = {owner.table: owner for owner in (ITEMS, USERS)}
"""By table."""
