"""Tails: the last events of users, which a store keeps alongside their summaries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Tail:
    """Last events of B users, packed: users end to end, oldest event first."""

    items: NDArray[np.int32]
    """[N] item rows of the model's vocabulary (in records), 0 for unknown items."""
    times: NDArray[np.int64]
    """[N] ms, or the ordinal in a log without times."""
    actions: NDArray[np.uint8]
    """[N] action codes."""
    offsets: NDArray[np.int64]
    """[B+1]."""

    @staticmethod
    def empty(num_users: int) -> Tail:
        """Tails without events."""
        return Tail(
            np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.uint8), np.zeros(num_users + 1, np.int64)
        )

    def of_user(self, row: int) -> Tail:
        """The tail of one of the users (B = 1)."""
        start, stop = self.offsets[row : row + 2].tolist()
        offsets = np.array([0, stop - start], np.int64)
        return Tail(self.items[start:stop], self.times[start:stop], self.actions[start:stop], offsets)
