"""Packed histories. Letters: B histories, T packed events, R rows of an item table, N queries, M model dim, C
columns and D dense inputs of features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vista.model.baselines.event_queries import EventQueries


@dataclass(frozen=True, slots=True)
class PackedEvents:
    """The events of all histories."""

    table: Tensor
    """[R, M] item vectors."""
    rows: Tensor
    """int64 [R] model row of each vector."""
    item: Tensor
    """int64 [T] rows of `table`."""
    action: Tensor
    """int64 [T]."""
    rating: Tensor | None
    """float32 [T]."""
    clock: Tensor
    """int64 [T] ms; ages are differences of it."""
    offsets: Tensor
    """int64 [B+1]."""
    entry: Tensor | None
    """int64 [T, C] features of the events, as in `BatchEvents`; None for a model that reads none."""
    dense: Tensor | None
    """float32 [T, D], like `entry`."""

    def newest_clock(self, queries: EventQueries) -> Tensor:
        """int64 [N]: the clock of the newest event that each query sees; arbitrary if it sees none."""
        if len(self.clock) == 0:
            return torch.zeros_like(queries.seen)
        return self.clock[(self.offsets[queries.history] + queries.seen - 1).clamp(min=0)]
