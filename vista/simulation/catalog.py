"""The simulated items: their topics, their quality, and their popularity as it drifts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import offsets_of
from vista.config import SimulateConfig
from vista.simulation.period import period

NUM_PERIODS = 24
"""Equal parts of the simulated period; the order of popularity within a topic changes from one to the next."""
DRIFT_MEMORY = 0.9
"""Correlation of an item's log popularity with that of the previous part of the period."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """Items with their hidden topic and quality, and the order of popularity in each part of the period."""

    topic: NDArray[np.uint8]
    """[num_items] latent topics."""
    quality: NDArray[np.float32]
    """[num_items] standard normal."""
    ranked: NDArray[np.int32]
    """[NUM_PERIODS, num_items] items grouped by topic, most popular first."""
    topic_start: NDArray[np.int64]
    """[K + 1] where each topic starts in a row of `ranked`."""


def make_catalog(config: SimulateConfig, seed: np.random.SeedSequence) -> Catalog:
    """Draw topics of equal size, qualities, and drifting popularity for all items."""
    rng = np.random.Generator(np.random.SFC64(seed))
    topic = rng.permutation(np.arange(config.num_items) % config.num_topics).astype(np.uint8)
    quality = rng.standard_normal(config.num_items, dtype=np.float32)
    ranked = np.empty((NUM_PERIODS, config.num_items), np.int32)
    popularity = rng.standard_normal(config.num_items)
    for index in range(NUM_PERIODS):
        ranked[index] = np.lexsort((-popularity, topic))
        noise = rng.standard_normal(config.num_items)
        popularity = DRIFT_MEMORY * popularity + np.sqrt(1 - DRIFT_MEMORY**2) * noise
    sizes = np.bincount(topic, minlength=config.num_topics)
    return Catalog(topic, quality, ranked, offsets_of(sizes))


def draw_items(
    rng: np.random.Generator,
    config: SimulateConfig,
    catalog: Catalog,
    topic: NDArray[np.uint8],
    time: NDArray[np.int64],
    of_event: NDArray[np.int64] | None = None,
) -> NDArray[np.int32]:
    """Draw an item for each of the topics [T] by popularity at `time`.

    `time` is [T], or [S] with `of_event` [T] as indices into it. Rank r within a topic of n items has probability
    log((r+2)/(r+1)) / log(n+1): Zipf-like, with exponent near 1.
    """
    begin, end = period(config)
    row = np.clip((time - begin) * NUM_PERIODS // (end - begin), 0, NUM_PERIODS - 1) * config.num_items
    index = row if of_event is None else row[of_event]
    size = np.diff(catalog.topic_start)
    rank = np.exp(rng.random(len(topic), dtype=np.float32) * np.log(size + 1).astype(np.float32)[topic]).astype(
        np.int64
    )
    rank = np.clip(rank - 1, 0, (size - 1)[topic])
    return np.asarray(catalog.ranked.reshape(-1)[index + catalog.topic_start[topic] + rank])
