"""Tails of requests: the newest events of users, right-aligned. Letters: B users, T packed events, L tail length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.log.gaps import UNKNOWN_GAP, gap_bucket
from vista.model.vista_model import VistaModel

Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PaddedTail:
    """The newest events of B users, right-aligned: item (model rows), action, gap int64 [B, L]; valid bool [B, L];
    last_time int64 [B] of the newest event (meaningless where there is none)."""

    item: Int
    action: Int
    gap: Int
    valid: NDArray[np.bool_]
    last_time: Int

    def select(self, users: slice | Int) -> PaddedTail:
        """Of some of the users, or of all in another order."""
        return PaddedTail(
            self.item[users], self.action[users], self.gap[users], self.valid[users], self.last_time[users]
        )


def pad_tail(model: VistaModel, item: NDArray[Any], time: Int, action: NDArray[Any], offsets: Int) -> PaddedTail:
    """Right-align packed newest events; of more than tail_len events the newest are taken.

    Args:
        item: [T] model rows; time: int64 [T] ms; action: [T]; offsets: int64 [B+1].
    """
    length = model.config.tail_len
    index = offsets[1:, None] - length + np.arange(length)
    valid = index >= offsets[:-1, None]
    index = np.where(valid, index, 0)
    if len(item) == 0:
        zeros = np.zeros(index.shape, np.int64)
        return PaddedTail(zeros, zeros, zeros, valid, np.zeros(len(index), np.int64))
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
    )
