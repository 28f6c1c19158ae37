"""Events that queries found in packed histories. Letters: N queries, K found events."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class FoundEvents:
    """The events that queries read."""

    index: Tensor
    """int64 [N, K] packed events."""
    valid: Tensor
    """bool [N, K]: False where a query found fewer than K events."""
