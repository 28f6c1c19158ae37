"""Packed histories, and the queries of candidates for their events.

Letters: B histories, T packed events, R rows of an item table, N queries, K found events, M model dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class EventQueries:
    """Candidates that read events."""

    vectors: Tensor
    """[N, M]."""
    item: Tensor
    """int64 [N] model rows."""
    history: Tensor
    """int64 [N], sorted."""
    seen: Tensor
    """int64 [N]: how many events of its history a query sees, oldest first."""


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

    def newest_clock(self, queries: EventQueries) -> Tensor:
        """int64 [N]: the clock of the newest event that each query sees; arbitrary if it sees none."""
        if len(self.clock) == 0:
            return torch.zeros_like(queries.seen)
        return self.clock[(self.offsets[queries.history] + queries.seen - 1).clamp(min=0)]


@dataclass(frozen=True, slots=True)
class FoundEvents:
    """The events that queries read."""

    index: Tensor
    """int64 [N, K] packed events."""
    valid: Tensor
    """bool [N, K]: False where a query found fewer than K events."""
