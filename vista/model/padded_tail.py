"""Tails of requests: the newest events of users, right-aligned. Letters: B users, T packed events, L tail length, C
columns and D dense inputs of features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Int
from vista.log.histories import UNKNOWN_GAP, RowColumn, RowFeatures, gap_bucket
from vista.model.vista_model import VistaModel


@dataclass(frozen=True, slots=True)
class PaddedTail:
    """The newest events of B users, oldest first, right-aligned."""

    item: Int
    """int64 [B, L] model rows."""
    action: Int
    """int64 [B, L]."""
    gap: Int
    """int64 [B, L] log buckets of the time since the event before; unknown for the first event."""
    valid: NDArray[np.bool_]
    """bool [B, L]: False in the padding."""
    last_time: Int
    """int64 [B] ms of the newest event; arbitrary if there is none."""
    entry: Int | None = None
    """int64 [B, L, C], like `dense` from `RowFeatureReader.encode`: features of the events; arbitrary in the padding.
    None for a model whose stage 2 reads none."""
    dense: Float32s | None = None
    """float32 [B, L, D]."""

    def select(self, users: slice | Int) -> PaddedTail:
        """The tails of some users, or of all in another order."""
        return PaddedTail(
            self.item[users],
            self.action[users],
            self.gap[users],
            self.valid[users],
            self.last_time[users],
            None if self.entry is None else self.entry[users],
            None if self.dense is None else self.dense[users],
        )


def pad_tail(
    model: VistaModel,
    item: NDArray[Any],
    time: Int,
    action: NDArray[Any],
    offsets: Int,
    features: Mapping[str, RowColumn] | None = None,
) -> PaddedTail:
    """Right-align the newest events of packed histories, at most `tail_len` per user.

    Args:
        item: [T] model rows.
        time: int64 [T] ms.
        action: [T].
        offsets: int64 [B+1].
        features: by name of a column, [T] with the model's codes; columns that are not given are missing.
    """
    length = model.config.tail_len
    index = offsets[1:, None] - length + np.arange(length)
    valid = index >= offsets[:-1, None]
    index = np.where(valid, index, 0)
    reader = model.tail_features
    encoded = None if reader is None else reader.encode(RowFeatures(features or {}), len(item))
    if len(item) == 0:
        zeros = np.zeros(index.shape, np.int64)
        empty = PaddedTail(zeros, zeros, zeros, valid, np.zeros(len(index), np.int64))
        if encoded is None:
            return empty
        entry, dense = (np.zeros((*index.shape, part.shape[1]), part.dtype) for part in (encoded.entry, encoded.dense))
        return replace(empty, entry=entry, dense=dense)
    times = time[index]
    gap = np.zeros(index.shape, np.int64)
    if model.encoder.gap is not None:
        known = valid[:, 1:] & valid[:, :-1]
        gap[:, 1:] = np.where(known, gap_bucket(np.diff(times, axis=1)), UNKNOWN_GAP)
    last_time = time[np.maximum(offsets[1:] - 1, 0)]
    return PaddedTail(
        np.where(valid, item[index], 0).astype(np.int64),
        np.where(valid, action[index], 0).astype(np.int64),
        gap,
        valid,
        last_time,
        None if encoded is None else encoded.entry[index],
        None if encoded is None else encoded.dense[index],
    )
