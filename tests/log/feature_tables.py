"""Item features as plain dictionaries, to compare with what a log holds."""

from __future__ import annotations

from typing import Any

import numpy as np

from vista.log.event_log import EventLog
from vista.log.item_features import CategoryColumn, FeatureColumn, NumberColumn, VectorColumn


def features_of(log: EventLog) -> dict[str, dict[Any, Any]]:
    """The features of a log that are not missing: column -> id -> values, number, or vector."""
    features = log.item_features
    assert features is not None
    ids = log.items.ids(np.arange(log.num_items)).tolist()
    return {
        name: {item: value for item, value in zip(ids, _values(column), strict=True) if value not in (None, [])}
        for name, column in features.columns.items()
    }


def _values(column: FeatureColumn) -> list[Any]:
    if isinstance(column, NumberColumn):
        return [None if np.isnan(number) else number for number in column.numbers.tolist()]
    if isinstance(column, VectorColumn):
        return [None if np.isnan(vector).all() else vector for vector in column.vectors.tolist()]
    return [names_of(column, row) for row in range(len(column.offsets) - 1)]


def names_of(column: CategoryColumn, row: int) -> list[str]:
    """The values of one item, sorted."""
    codes = column.codes[column.offsets[row] : column.offsets[row + 1]]
    assert (np.diff(codes) > 0).all()
    return sorted(column.values.ids(codes).tolist())
