"""Tails: the last events of users, which a store keeps alongside their summaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import offsets_of


@dataclass(frozen=True, slots=True)
class Tail:
    """Last events of B users, packed: users end to end, oldest event first."""

    items: NDArray[np.int32]
    """[N] item rows of the model's vocabulary (in records), 0 for unknown items."""
    times: NDArray[np.int64]
    """[N] ms, or the ordinal in a log without times."""
    actions: NDArray[np.uint8]
    """[N] action codes. Callers of the scorer can pass names."""
    offsets: NDArray[np.int64]
    """[B+1]."""
    features: Mapping[str, Any] = field(default_factory=dict)
    """By name of a column, [N] each: in records, int32 codes of the model's values, -1 for a missing one, or float32
    numbers, NaN for a missing one. Callers of the scorer pass the values themselves."""

    @staticmethod
    def empty(num_users: int) -> Tail:
        """Tails without events and columns of features."""
        return Tail(
            np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.uint8), np.zeros(num_users + 1, np.int64)
        )

    @staticmethod
    def concatenated(tails: Sequence[Tail]) -> Tail:
        """The tails of all parts, end to end; at least one part, all with the same columns of features."""
        if len(tails) == 1:
            return tails[0]
        return Tail(
            np.concatenate([tail.items for tail in tails]),
            np.concatenate([tail.times for tail in tails]),
            np.concatenate([tail.actions for tail in tails]),
            offsets_of(np.concatenate([np.diff(tail.offsets) for tail in tails])),
            {name: np.concatenate([tail.features[name] for tail in tails]) for name in tails[0].features},
        )

    def select(self, index: Any, offsets: NDArray[np.int64]) -> Tail:
        """The events at `index`, as NumPy indexes, with new offsets."""
        features = {name: column[index] for name, column in self.features.items()}
        return Tail(self.items[index], self.times[index], self.actions[index], offsets, features)

    def of_user(self, row: int) -> Tail:
        """The tail of one of the users (B = 1)."""
        start, stop = self.offsets[row : row + 2].tolist()
        return self.select(slice(start, stop), np.array([0, stop - start], np.int64))
