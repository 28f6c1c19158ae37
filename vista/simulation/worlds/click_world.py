"""The common part of the worlds with one task, whose clicks follow a few signals of the history."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from vista.arrays import offsets_of
from vista.config import SimulateConfig
from vista.logistic_regression import binned_features
from vista.simulation.catalog import Catalog
from vista.simulation.event_stream import EventStream
from vista.simulation.pooled_vectors import PooledView
from vista.simulation.queries import Queries
from vista.simulation.request_stream import RequestStream
from vista.simulation.simulated_log import SimulatedChunk, SimulatedLog
from vista.simulation.topic_index import TopicIndex


class ClickWorld(ABC):
    """A click has probability sigmoid(bias + weights · signals), where signals are computed from earlier events.

    A predictor with limited memory computes the same signals from the newest events alone, along with hints: what else
    these events tell about the signals of the whole history.
    """

    tasks: ClassVar[tuple[str, ...]] = ("click",)
    bias: ClassVar[float]
    weights: ClassVar[tuple[float, ...]]

    @abstractmethod
    def draw(
        self, rng: np.random.Generator, config: SimulateConfig, catalog: Catalog, offsets: NDArray[np.int64]
    ) -> tuple[EventStream, RequestStream, NDArray[np.int32]]:
        """Draw the events of users at `offsets` [U + 1], the requests, and their candidates [N]."""

    @abstractmethod
    def signals(
        self, catalog: Catalog, item: NDArray[np.int32], timestamp: NDArray[np.int64], asked: Queries
    ) -> NDArray[np.float64]:
        """Signals and hints [N, R] of the queries, from the known events alone; signals are the first columns.

        Args:
            catalog: the items' topics.
            item: [T] packed events of all users.
            timestamp: [T] ms
            asked: candidates, times, and known events.
        """

    def pooled_views(self, catalog: Catalog) -> tuple[PooledView, ...]:
        """Items are compared by identity and by topic."""
        identity = np.arange(len(catalog.topic))
        return PooledView(identity, (identity,)), PooledView(catalog.topic, (catalog.topic,))

    def make_chunk(
        self, config: SimulateConfig, catalog: Catalog, lengths: NDArray[np.int64], seed: np.random.SeedSequence
    ) -> SimulatedChunk:
        """Draw the events and impressions of users with `lengths` [U] events, each at least 1."""
        rng = np.random.Generator(np.random.SFC64(seed))
        offsets = offsets_of(lengths)
        events, requests, candidate = self.draw(rng, config, catalog, offsets)
        asked = Queries(candidate, requests.time, offsets[requests.user], requests.stop)
        signals = self.signals(catalog, events.item, events.timestamp, asked)
        logit = self.bias + signals[:, : len(self.weights)] @ np.array(self.weights)
        probability = (1 / (1 + np.exp(-logit))).astype(np.float32)[:, None]
        label = (rng.random(probability.shape, dtype=np.float32) < probability).astype(np.int8)
        topics = TopicIndex(catalog.topic[events.item])
        return SimulatedChunk(
            item=events.item,
            timestamp=events.timestamp,
            action=events.action,
            impression_item=candidate,
            impression_timestamp=requests.time,
            impression_position=asked.stop - asked.start,
            label=label,
            probability=probability,
            decisive_age=topics.age(catalog.topic[candidate], asked.start, asked.stop),
        )

    def window_features(self, log: SimulatedLog, window: int | None, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Regressors [chosen.sum(), F] of the chosen impressions, from the last `window` events (None: all events)."""
        signals = self.signals(log.catalog, log.item, log.timestamp, log.queries(chosen, window))
        return binned_features(signals)
