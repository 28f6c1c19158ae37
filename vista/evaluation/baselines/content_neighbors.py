"""Content neighbors: items whose features resemble those of the user's history. They need no events of an item."""

from __future__ import annotations

import numpy as np

from vista.arrays import Float32s, Floats, Int, offsets_of
from vista.evaluation.baselines.popularity import tie_breaker
from vista.evaluation.baselines.sparse_rows import SparseRows
from vista.examples.frequency import item_counts
from vista.log.event_log import EventLog
from vista.log.item_features import FeatureColumn, VectorColumn
from vista.model.feature_spec import FeatureSpec
from vista.model.item_feature_table import value_codes

_ITEMS_AT_ONCE = 1 << 14
"""Vectors that are held in float64 at once: float32 sums would differ between items that tie."""


class ContentNeighbors:
    """Sum over the user's events of the cosines between an item's features and those of the event's item.

    Each column of features has a cosine of its own, of the values that an item has, or of the bucket of its number,
    weighted by their inverse frequency among items, or of its vector. Items that tie rank by popularity.
    """

    name = "content neighbors"

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log = log
        features = log.item_features
        if features is None:
            raise ValueError(f"{log.path} has no features of items")
        self._tie = tie_breaker(item_counts(log, counts))
        self._values: list[SparseRows] = []
        self._vectors: list[Float32s] = []
        for name, column in features.columns.items():
            if isinstance(column, VectorColumn):
                self._vectors.append(_unit_vectors(column))
            else:
                self._values.append(_weighted_values(name, column))

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        events = self._log.gather(user, seen, features=False)
        out = np.tile(self._tie, (len(user), 1))
        profiles = [np.zeros((len(user), vectors.shape[1])) for vectors in self._vectors]
        for row, (begin, end) in enumerate(zip(events.offsets[:-1], events.offsets[1:], strict=True)):
            item, times = np.unique(events.item[begin:end], return_counts=True)
            weight = times.astype(np.float64)
            for values in self._values:
                profile = values.weighted_sum(item, weight)
                out[row] += np.bincount(values.row, values.value * profile[values.column], len(out[row]))
            for profile, vectors in zip(profiles, self._vectors, strict=True):
                profile[row] = weight @ vectors[item]
        for profile, vectors in zip(profiles, self._vectors, strict=True):
            for begin in range(0, len(vectors), _ITEMS_AT_ONCE):
                block = vectors[begin : begin + _ITEMS_AT_ONCE].astype(np.float64)
                out[:, begin : begin + len(block)] += profile @ block.T
        return out


def _unit_vectors(column: VectorColumn) -> Float32s:
    """Vectors of length 1, or 0 where one is missing: a single copy."""
    vectors: Float32s = np.nan_to_num(column.vectors, nan=0.0)
    largest = np.maximum(vectors.max(axis=1), -vectors.min(axis=1))
    vectors /= np.maximum(largest, np.finfo(np.float32).tiny)[:, None]  # Squares then neither overflow nor vanish.
    vectors /= np.maximum(np.sqrt(np.einsum("vd,vd->v", vectors, vectors)), 1e-12)[:, None]
    return vectors


def _weighted_values(name: str, column: FeatureColumn) -> SparseRows:
    """Unit vectors of items over the values of a column."""
    spec = FeatureSpec.of(name, column)
    owner, code = value_codes(column, spec)
    num_items = len(column.is_known)
    items_of_value = np.bincount(code, minlength=spec.size)
    weight = np.log((1 + num_items) / (1 + items_of_value))[code]
    length = np.sqrt(np.bincount(owner, weight**2, num_items))
    offsets = offsets_of(np.bincount(owner, minlength=num_items))
    return SparseRows(offsets, code, weight / np.maximum(length[owner], 1e-12), spec.size)
