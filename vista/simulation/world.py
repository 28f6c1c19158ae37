"""What the simulation needs from a world, which says how events come about and what decides a click."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vista.config import SimulateConfig
from vista.simulation.catalog import Catalog
from vista.simulation.pooled_vectors import PooledView
from vista.simulation.simulated_log import SimulatedChunk, SimulatedLog


class World(Protocol):
    """Draws events and impressions, and knows which features of a history decide the labels."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the labels; the first is click."""

    def make_chunk(
        self, config: SimulateConfig, catalog: Catalog, lengths: NDArray[np.int64], seed: np.random.SeedSequence
    ) -> SimulatedChunk:
        """Draw the events and impressions of users with `lengths` [U] events, each at least 1."""

    def window_features(self, log: SimulatedLog, window: int | None, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Regressors [chosen.sum(), F] of the chosen impressions, from the last `window` events (None: all events)."""

    def pooled_views(self, catalog: Catalog) -> tuple[PooledView, ...]:
        """The true classes of items, of which pooled vectors hold the shares."""
