"""A request, as the model reads it. B users, S seeds, M model dim."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Int
from vista.model.padded_tail import PaddedTail
from vista.model.row_feature_reader import EncodedRows
from vista.scorer.request_counters import RequestCounters


@dataclass(frozen=True, slots=True)
class Request:
    """Summaries, tails, times and features of B users' requests."""

    summary: Tensor
    """float32 [B, S, M]."""
    tail: PaddedTail
    now: Int | None
    """[B] ms, or None if unknown."""
    missing: NDArray[np.bool_]
    """[B] users without a usable record, whose summary is that of an empty history."""
    counters: RequestCounters | None = None
    """Of the B users; None without counters."""
    features: EncodedRows | None = None
    """Of the B requests; None if all are missing."""
    users: EncodedRows | None = None
    """Features of the B users; None if all are missing."""

    def __len__(self) -> int:
        return len(self.missing)

    def select(self, users: slice | Int) -> Request:
        """Some of the users, or all of them in another order."""
        now = None if self.now is None else self.now[users]
        counters = None if self.counters is None else self.counters.select(users)
        features, own = (None if part is None else part.select(users) for part in (self.features, self.users))
        return Request(self.summary[users], self.tail.select(users), now, self.missing[users], counters, features, own)
