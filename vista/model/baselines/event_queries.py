"""Queries of candidates for events of packed histories. Letters: N queries, M model dim."""

from __future__ import annotations

from dataclasses import dataclass

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
