"""A vocabulary that is a hash function: any number of texts share a fixed number of rows.

Saved models rely on which text reads which row, so the hash function never changes: XXH3-64 (seed 0) of the text's
UTF-8, modulo the number of rows.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vista.log.vocabulary import Ids, Vocabulary
from vista.model.feature_spec import FeatureSpec


class HashedVocabulary(Vocabulary):
    """Values of a category that share `num_rows` rows. Every text has a row, except "", which is missing."""

    __slots__ = ("_num_rows",)

    def __init__(self, num_rows: int) -> None:
        """
        Args:
            num_rows: at least 1.
        """
        super().__init__("str", np.empty(0, np.uint8), np.zeros(1, np.int64))
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __repr__(self) -> str:
        return f"HashedVocabulary({self._num_rows} rows)"

    def __reduce__(self) -> tuple[Any, ...]:
        return HashedVocabulary, (self._num_rows,)

    def rows(self, ids: Ids) -> NDArray[np.int64]:
        """Rows int64 [N] of texts; -1 for "". Raises AttributeError if a value is not text."""
        hashed, count = xxhash.xxh3_64_intdigest, self._num_rows
        return np.fromiter((hashed(text.encode()) % count if text else -1 for text in ids), np.int64, len(ids))  # type: ignore[union-attr]

    def ids(self, rows: Any) -> NDArray[Any]:
        """What stands for the texts of rows: their number, since the texts are not kept."""
        out = np.empty(len(index := np.atleast_1d(rows)), object)
        out[:] = [f"row {row} of {self._num_rows}" for row in index.tolist()]
        return out

    def extended(self, new_ids: Ids) -> Vocabulary:
        """This vocabulary, since all texts have a row."""
        return self

    def save(self, folder: Any, name: str) -> list[Path]:
        """Nothing is written: the number of rows is in the model's schema."""
        return []

    def digest(self) -> str:
        return hashlib.sha256(f"vista-hashed-vocabulary {self._num_rows}\n".encode()).hexdigest()


def load_values(folder: Path, name: str, column: FeatureSpec) -> Vocabulary:
    """The values of a category that were saved under `name`.

    Raises:
        LogFormatError: if a file is missing or damaged.
        ValueError: if they do not fit the column.
    """
    if column.hashed:
        return HashedVocabulary(column.size)
    values = Vocabulary.load(folder, name)
    if values.kind != "str" or len(values) > column.size:
        raise ValueError(f"{name} must hold at most {column.size} texts")
    return values
