"""Values of categories that training sees, which are those that a model knows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vista.log.histories import ColumnValues, RowFeatures
from vista.log.vocabulary import Vocabulary
from vista.model.features import HashedVocabulary


class SeenValues:
    """Collects the values that occur in the rows that training may see.

    A value that occurs only in other rows would get a row of the encoder's embedding that never trains. Left out, it is
    missing to the model, as a new value is in production.
    """

    def __init__(self, values: ColumnValues, hashed: Mapping[str, int]) -> None:
        """
        Args:
            values: of the log.
            hashed: by name of a category whose values are hashed: the number of their rows. It knows all values.
        """
        self._values = dict(values)
        for name in hashed.keys() & values.keys():
            self._values[name] = HashedVocabulary(hashed[name])
        self._is_seen = {
            name: np.zeros(len(known) + 1, np.bool_)
            for name, known in self._values.items()
            if known is not None and name not in hashed
        }

    def add(self, features: RowFeatures) -> None:
        """Add rows that training may see, with the log's codes."""
        for name, is_seen in self._is_seen.items():
            is_seen[features.columns[name]] = True  # -1, a missing value, marks the last entry

    @property
    def values(self) -> ColumnValues:
        """Those of the log that occur in the rows."""
        kept = dict(self._values)
        for name, is_seen in self._is_seen.items():
            known = self._values[name]
            assert known is not None
            if not is_seen[:-1].all():
                ids = known.ids(np.flatnonzero(is_seen[:-1]))
                kept[name] = Vocabulary.empty("str").extended(ids.tolist())
        return kept
