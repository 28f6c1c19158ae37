"""A simulated log in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.config import SimulateConfig
from vista.simulation.catalog import Catalog
from vista.simulation.queries import Queries


@dataclass(frozen=True, slots=True)
class SimulatedChunk:
    """Events and impressions of consecutive users, packed in the order of users; items are rows of the catalog."""

    item: NDArray[np.int32]
    """[T]"""
    timestamp: NDArray[np.int64]
    """[T] ms"""
    action: NDArray[np.uint8]
    """[T] codes of `ACTIONS`."""
    impression_item: NDArray[np.int32]
    """[N]"""
    impression_timestamp: NDArray[np.int64]
    """[N] ms"""
    impression_position: NDArray[np.int64]
    """[N] number of the user's events strictly before the impression."""
    label: NDArray[np.int8]
    """[N, tasks] 0, 1, or -1 where unknown; the tasks are those of the world."""
    probability: NDArray[np.float32]
    """[N, tasks] true probability of label 1; that of like and long_view is given a click."""
    decisive_age: NDArray[np.int64]
    """[N] number of the user's events since the newest event of the candidate's topic; -1 without such an event."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedLog(SimulatedChunk):
    """All users' events and impressions, with what they were drawn from."""

    config: SimulateConfig
    catalog: Catalog
    offsets: NDArray[np.int64]
    """[num_users + 1] where each user's events start."""
    impression_user: NDArray[np.int64]
    """[N] user rows, which are ids less 1."""

    def queries(self, chosen: NDArray[np.bool_], window: int | None = None) -> Queries:
        """The chosen impressions [N], with the user's last `window` events before each of them; None for all."""
        first = self.offsets[self.impression_user[chosen]]
        stop = first + self.impression_position[chosen]
        start = first if window is None else np.maximum(first, stop - window)
        return Queries(self.impression_item[chosen], self.impression_timestamp[chosen], start, stop)

    @property
    def num_events(self) -> int:
        return len(self.item)
