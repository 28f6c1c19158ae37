"""Columns of features that a trained model knows, joined with those of a log that has more columns, or more values.

What the model knows keeps its meaning: numbers keep their buckets, means, and scales, and each value keeps its row of
the encoder's embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vista.arrays import Int
from vista.errors import ConfigError
from vista.log.vocabulary import Vocabulary
from vista.model.feature_spec import FeatureSpec
from vista.model.hashed_vocabulary import HashedVocabulary


@dataclass(frozen=True, slots=True)
class GrownColumns:
    """Columns of a model in their order, then those that only a log has."""

    columns: list[FeatureSpec]
    values: dict[str, Vocabulary]
    """By name of a category: the model's values, then those that only the log has."""
    value_rows: Int
    """For each row of the new encoder's `values`, the row that the model has for it, or -1."""
    dense_rows: Int
    """Likewise for `dense`."""

    @classmethod
    def of(
        cls,
        known: Sequence[FeatureSpec],
        known_values: Mapping[str, Vocabulary | None],
        given: Sequence[FeatureSpec],
        given_values: Mapping[str, Vocabulary | None],
    ) -> GrownColumns:
        """Join the columns.

        Args:
            known: the model's columns; known_values: the values of its categories, by name.
            given: the log's columns; given_values: likewise.

        Raises:
            ConfigError: naming a column of the model that the log lacks, or has with another kind or size.
        """
        _check(known, {column.name: column for column in given})
        names = {column.name for column in known}
        columns: list[FeatureSpec] = []
        values: dict[str, Vocabulary] = {}
        for column in (*known, *(column for column in given if column.name not in names)):
            if column.hashed:
                values[column.name] = HashedVocabulary(column.size)
            elif (more := given_values.get(column.name)) is not None:
                own = known_values.get(column.name) or Vocabulary.empty("str")
                values[column.name] = own.extended(more.ids(np.arange(len(more))).tolist())
                column = replace(column, size=max(len(values[column.name]), 1))
            columns.append(column)
        return cls(
            columns,
            values,
            _rows([column.num_rows for column in columns], [column.num_rows for column in known]),
            _rows([column.num_dense for column in columns], [column.num_dense for column in known]),
        )

    @property
    def new_missing_rows(self) -> Int:
        """The rows of `values` for a missing value, of the columns that only the log has."""
        sizes = [column.num_rows for column in self.columns]
        first = np.cumsum([0, *sizes[:-1]])
        new: Int = first[self.value_rows[first] < 0]
        return new


def _check(known: Sequence[FeatureSpec], given: Mapping[str, FeatureSpec]) -> None:
    def described(column: FeatureSpec) -> str:
        if column.hashed:
            return f"category of {column.size} hashed rows"
        return f"vector of {column.size}" if column.kind == "vector" else column.kind

    for column in known:
        found = given.get(column.name)
        if found is None:
            raise ConfigError(
                f"init_from: the model reads the feature {column.name!r}, which the log lacks; append a table that has "
                "it, with `vista prepare append=true`"
            )
        if described(found) != described(column):
            raise ConfigError(
                f"init_from: the feature {column.name!r} is a {described(found)}, but was a {described(column)} in "
                "training; prepare the log with the same kind of feature, and hash the same features "
                "(model.hashed_features)"
            )


def _rows(new: Sequence[int], old: Sequence[int]) -> Int:
    """Rows of a table of columns [sum(new)]: the row of the same column and place in the old table, or -1.

    Args:
        new: rows per column; old: likewise, of the first len(old) columns.
    """
    rows = np.full(sum(new), -1, np.int64)
    first = np.cumsum([0, *new[:-1]])
    for start, before, size in zip(first, np.cumsum([0, *old[:-1]]), old, strict=False):
        rows[start : start + size] = before + np.arange(size)
    return rows
