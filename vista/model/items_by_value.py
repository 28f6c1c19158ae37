"""Which items have a value of a category, to filter them. V items of the vocabulary, E entries of a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.errors import shown
from vista.model.feature_spec import FeatureSpec
from vista.model.item_feature_table import ItemFeatureTable


class ItemsByValue:
    """The items of each value of the categories of a model. A column is sorted at its first use.

    Args:
        table: features of the items; None for a model without any.
        columns: of the model's schema.
    """

    def __init__(self, table: ItemFeatureTable | None, columns: Sequence[FeatureSpec]) -> None:
        self._table = table
        self._columns: dict[str, tuple[int, FeatureSpec]] = {}
        """By name of a category: its first row of the embedding, and how it is read."""
        first = 0
        for column in columns:
            if column.kind == "category":
                self._columns[column.name] = first, column
            first += column.num_rows
        self._sorted: dict[str, tuple[NDArray[np.int32], Int]] = {}
        """By name: model rows [E] in the order of their values, and offsets [size + 1]."""

    def mask(self, where: Mapping[str, Any], num_rows: int) -> NDArray[np.bool_]:
        """bool [num_rows]: model rows that have one of the given values in each of the given columns.

        Args:
            where: by name of a category, a value or a list of values.
            num_rows: 1 + V.

        Raises:
            ValueError: the model has no such category, its values are hashed, or it does not know a value.
            TypeError: `where` is not a mapping, or a value has another type than the category's.
        """
        if not isinstance(where, Mapping):
            raise TypeError(f"where: must be a mapping from names of categories to values, got {shown(where)}")
        mask = np.ones(num_rows, np.bool_)
        for name, given in where.items():
            if name not in self._columns:
                known = ", ".join(self._columns) or "none"
                raise ValueError(f"where: {shown(name)} is not a category of this model's items, which are: {known}")
            if isinstance(given, (str, int, np.integer)):
                given = [given]
            elif not isinstance(given, (list, tuple, set, frozenset, np.ndarray)):
                raise TypeError(f"where: {name} must be a value or a list of values, got {shown(given)}")
            mask &= self._has_value(name, list(given), num_rows)
        return mask

    def _has_value(self, name: str, values: list[Any], num_rows: int) -> NDArray[np.bool_]:
        column = self._columns[name][1]
        if column.hashed:
            raise ValueError(
                f"where: {name!r} is hashed in this model, so several values share a row; pass the items as within=…"
            )
        assert self._table is not None
        try:
            codes = self._table.values[name].rows(values) if values else np.zeros(0, np.int64)
        except TypeError as error:
            raise TypeError(f"where: {name}: {error}") from None
        if (codes < 0).any():
            unknown = values[int(np.flatnonzero(codes < 0)[0])]
            raise ValueError(f"where: {shown(unknown)} is not a value of {name!r} that this model knows")
        if name not in self._sorted:  # Two threads that meet here compute the same.
            self._sorted[name] = self._sort(name)
        rows, offsets = self._sorted[name]
        mask = np.zeros(num_rows, np.bool_)
        for code in codes.tolist():
            mask[rows[offsets[code] : offsets[code + 1]]] = True
        return mask

    def _sort(self, name: str) -> tuple[NDArray[np.int32], Int]:
        assert self._table is not None
        first, column = self._columns[name]
        entry, starts = self._table.entry.cpu().numpy(), self._table.offsets.cpu().numpy()
        owner = np.repeat(np.arange(len(starts) - 1, dtype=np.int32), np.diff(starts))
        code = entry - (first + 1)  # The first row stands for items without a value.
        own = (code >= 0) & (code < column.size)
        code, owner = code[own], owner[own]
        return owner[np.argsort(code, kind="stable")], offsets_of(np.bincount(code, minlength=column.size))
