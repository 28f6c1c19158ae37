"""Features of items, as a log holds them and as a model keeps them; a log holds those of users alike. NumPy only.

N items, V values of a column, E entries of all items together, D entries of a vector. A column has one of three kinds:

- *category*: any number of values per item, such as a brand, or all genres of a movie;
- *number*: one float, such as a price;
- *vector*: D floats, such as the embedding of a text or an image.

An item without a value is missing in that column: it has no entry, NaN, or a vector of NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Int, offsets_of
from vista.log.histories import ranges
from vista.log.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class CategoryColumn:
    """Values of N items, packed: items end to end."""

    kind: ClassVar[str] = "category"
    values: Vocabulary
    """The V distinct values, as text."""
    codes: NDArray[np.int32]
    """[E] rows of `values`, ascending and distinct per item."""
    offsets: Int
    """[N + 1]."""

    def recoded(self, values: Vocabulary) -> CategoryColumn:
        """The same items with codes of other `values`; values that these lack are left out."""
        code = values.rows(self.values.ids(np.arange(len(self.values))).tolist())[self.codes]
        owner = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))[code >= 0]
        code = code[code >= 0]
        counts = np.bincount(owner, minlength=len(self.offsets) - 1)
        return CategoryColumn(values, code[np.lexsort((code, owner))].astype(np.int32), offsets_of(counts))

    def with_used_values(self) -> CategoryColumn:
        """The same items, without values that none of them has."""
        used = np.unique(self.codes)
        return (
            self
            if len(used) == len(self.values)
            else self.recoded(Vocabulary.empty("str").extended(self.values.ids(used).tolist()))
        )

    def select(self, rows: Int) -> CategoryColumn:
        """The values of items int64 [n]; a row of -1 is an item without any."""
        starts = self.offsets[rows]
        counts = np.where(rows < 0, 0, self.offsets[rows + 1] - starts)
        index = ranges(starts, counts)
        return CategoryColumn(self.values, self.codes[index], offsets_of(counts))

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """Whether each item has a value: bool [N]."""
        return np.diff(self.offsets) > 0


@dataclass(frozen=True, slots=True)
class NumberColumn:
    """One number per item."""

    kind: ClassVar[str] = "number"
    numbers: Float32s
    """[N], NaN where it is missing."""

    def select(self, rows: Int) -> NumberColumn:
        """The numbers of items int64 [n]; a row of -1 is missing."""
        return NumberColumn(np.where(rows < 0, np.float32(np.nan), self.numbers[rows]))

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """Whether each item has a number: bool [N]."""
        return ~np.isnan(self.numbers)


@dataclass(frozen=True, slots=True)
class VectorColumn:
    """One vector per item."""

    kind: ClassVar[str] = "vector"
    vectors: Float32s
    """[N, D], NaN in all of D where it is missing."""

    def select(self, rows: Int) -> VectorColumn:
        """The vectors of items int64 [n]; a row of -1 is missing."""
        return VectorColumn(np.where(rows[:, None] < 0, np.float32(np.nan), self.vectors[rows]))

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """Whether each item has a vector: bool [N]."""
        return ~np.isnan(self.vectors[:, 0])


FeatureColumn: TypeAlias = CategoryColumn | NumberColumn | VectorColumn


@dataclass(frozen=True, slots=True)
class ItemFeatures:
    """Features of N items, in the order of a vocabulary of items."""

    columns: Mapping[str, FeatureColumn]
    """By name, at least one, in the order in which they were declared."""

    def select(self, rows: Int) -> ItemFeatures:
        """Features of items int64 [n], such as those of a model's vocabulary; a row of -1 has none."""
        return ItemFeatures({name: column.select(rows) for name, column in self.columns.items()})

    def described(self) -> list[str]:
        """One line per column: its name, kind, and size, and the share of items that have a value."""
        return [
            feature_line(name, column.kind, _size(column), float(column.is_known.mean()))
            for name, column in self.columns.items()
        ]


def feature_line(name: str, kind: str, size: int, share: float, owners: str = "items") -> str:
    """A column in words.

    Args:
        size: number of values of a category, or dimensions of a vector.
        share: of the items, users, events, or impressions that have a value.
        owners: items | users | events | impressions.
    """
    plural = "" if size == 1 else "s"
    sizes = {"category": f" of {size:,} value{plural}", "vector": f" of {size:,} dimension{plural}"}
    return f"{name}: {kind}{sizes.get(kind, '')}, {share:.0%} of {owners}"


def _size(column: FeatureColumn) -> int:
    if isinstance(column, CategoryColumn):
        return len(column.values)
    return column.vectors.shape[1] if isinstance(column, VectorColumn) else 1


# The two kinds of rows that a feature table describes: items and users. NumPy only.


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
