"""How a model encodes one column of features."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from vista.arrays import Float32s
from vista.config.checks import require
from vista.log.item_features import CategoryColumn, FeatureColumn, NumberColumn

MAX_BUCKETS = 32
MAX_ABS_SCORE = 5.0
"""Standardized numbers are clipped here."""
KINDS = ("category", "number", "vector")


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """One column. A number has an embedding per bucket, and adds its standardized value along one direction."""

    name: str
    kind: str
    """category, number, or vector."""
    size: int
    """Number of distinct values, of rows that hashed values share, of buckets, or of entries of a vector."""
    bounds: list[float] = field(default_factory=list)
    """Of a number: ascending upper bounds of all buckets but the last, [size - 1]."""
    mean: float = 0.0
    scale: float = 1.0
    """Of a number: mean and standard deviation. Of a vector: 0, and the root mean square of its length."""
    hashed: bool = False
    """Of a category: whether its values share `size` rows by their hash (`HashedVocabulary`)."""

    def __post_init__(self) -> None:
        require(type(self.name) is str and self.name != "", "schema", "a feature's name must be a non-empty string")
        where = f"schema: feature {self.name}"
        require(self.kind in KINDS, where, f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        require(type(self.size) is int and self.size > 0, where, f"size must be at least 1, got {self.size!r}")
        require(type(self.bounds) is list, where, "bounds must be a list")
        numbers = (self.mean, self.scale, *self.bounds)
        finite = all(type(number) is float and math.isfinite(number) for number in numbers)
        require(finite and self.scale > 0, where, "mean, scale, and bounds must be finite floats, and scale positive")
        buckets = self.size - 1 if self.kind == "number" else 0
        require(len(self.bounds) == buckets, where, "a number needs size - 1 bounds; other kinds take none")
        require(all(low < high for low, high in pairwise(self.bounds)), where, "bounds must ascend")
        is_valid = type(self.hashed) is bool and (self.kind == "category" or not self.hashed)
        require(is_valid, where, "hashed must be true or false, and only a category can be hashed")

    @property
    def num_rows(self) -> int:
        """Rows of the embedding: one per value or bucket, and one for rows without a value."""
        return 1 + (0 if self.kind == "vector" else self.size)

    @property
    def num_dense(self) -> int:
        """Entries of the dense input."""
        return {"category": 0, "number": 1, "vector": self.size}[self.kind]

    @classmethod
    def of(cls, name: str, column: FeatureColumn) -> FeatureSpec:
        """How to read a column, measured on its items."""
        if isinstance(column, CategoryColumn):
            return cls(name, column.kind, max(len(column.values), 1))
        if isinstance(column, NumberColumn):
            return _number(name, column.numbers)
        known = column.vectors[column.is_known].astype(np.float64)
        length = math.sqrt(np.square(known).sum(1).mean()) if len(known) else 0.0
        return cls(name, column.kind, column.vectors.shape[1], scale=length or 1.0)


def _number(name: str, numbers: Float32s) -> FeatureSpec:
    known = numbers[~np.isnan(numbers)].astype(np.float64)
    if not len(known):
        return FeatureSpec(name, "number", 1)
    bounds = np.unique(np.quantile(known, np.arange(1, MAX_BUCKETS) / MAX_BUCKETS, method="inverted_cdf"))
    bounds = bounds[bounds < known.max()]  # the last bucket is not empty
    scale = float(known.std())
    return FeatureSpec(name, "number", len(bounds) + 1, bounds.tolist(), float(known.mean()), scale or 1.0)
