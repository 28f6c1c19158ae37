"""Features of items, as a log holds them and as a model keeps them. NumPy only.

N items, V values of a column, E entries of all items together, D entries of a vector. A column has one of three kinds:

- *category*: any number of values per item, such as a brand, or all genres of a movie;
- *number*: one float, such as a price;
- *vector*: D floats, such as the embedding of a text or an image.

An item without a value is missing in that column: it has no entry, NaN, or a vector of NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Int
from vista.log.histories import offsets_of, ranges
from vista.log.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class CategoryColumn:
    """Values of N items, packed: items end to end."""

    values: Vocabulary
    """The V distinct values, as text."""
    codes: NDArray[np.int32]
    """[E] rows of `values`, ascending and distinct per item."""
    offsets: Int
    """[N + 1]."""

    def select(self, rows: Int) -> CategoryColumn:
        """The values of items int64 [n]; a row of -1 is an item without any."""
        counts = np.where(rows < 0, 0, np.diff(self.offsets)[rows])
        index = ranges(np.where(rows < 0, 0, self.offsets[:-1][rows]), counts)
        return CategoryColumn(self.values, self.codes[index], offsets_of(counts))


@dataclass(frozen=True, slots=True)
class NumberColumn:
    """One number per item."""

    numbers: Float32s
    """[N], NaN where it is missing."""

    def select(self, rows: Int) -> NumberColumn:
        """The numbers of items int64 [n]; a row of -1 is missing."""
        return NumberColumn(np.where(rows < 0, np.float32(np.nan), self.numbers[rows]))


@dataclass(frozen=True, slots=True)
class VectorColumn:
    """One vector per item."""

    vectors: Float32s
    """[N, D], NaN in all of D where it is missing."""

    def select(self, rows: Int) -> VectorColumn:
        """The vectors of items int64 [n]; a row of -1 is missing."""
        return VectorColumn(np.where(rows[:, None] < 0, np.float32(np.nan), self.vectors[rows]))


FeatureColumn: TypeAlias = CategoryColumn | NumberColumn | VectorColumn


@dataclass(frozen=True, slots=True)
class ItemFeatures:
    """Features of N items, in the order of a vocabulary of items."""

    columns: Mapping[str, FeatureColumn]
    """By name, at least one, in the order in which they were declared."""

    def select(self, rows: Int) -> ItemFeatures:
        """Features of items int64 [n], such as those of a model's vocabulary; a row of -1 has none."""
        return ItemFeatures({name: column.select(rows) for name, column in self.columns.items()})
