"""Users' topics, and the episodes in which their slow interests take turns.

The settings of the simulation share this module, `event_stream`, and `request_stream`. Nothing here touches files. All
code is NumPy over packed arrays, one chunk of users at a time. Every chunk has its own random stream, so the bytes
depend only on the config (and on NumPy's version), never on the number of threads.

Letters: U users of the chunk, T events, S sessions, E episodes, R requests, N impressions, K topics.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.config import SimulateConfig
from vista.simulation.topic_index import IntArray


@dataclass(frozen=True, slots=True)
class Interests:
    """Users' topics, and the episodes of their histories."""

    order: NDArray[np.uint8]
    """[U, K] each user's topics: first the slow interests in the order of their episodes, then all others."""
    num_slow: NDArray[np.int64]
    """[U] number of slow interests."""
    episode_start: NDArray[np.int64]
    """[E] packed index of the first event."""
    episode_ordinal: NDArray[np.int64]
    """[E] 0-based number of the episode within its user."""
    active: NDArray[np.uint8]
    """[E, 4] the episode's interest, the previous interest, two passing topics."""


def draw_orders(
    rng: np.random.Generator, config: SimulateConfig, num_users: int, reserved: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw each user's order of topics and number of slow interests.

    Returns:
        Topics uint8 [U, K - reserved] in random order, without the first `reserved`, and numbers int64 [U].
    """
    order = rng.random((num_users, config.num_topics - reserved), dtype=np.float32).argsort(axis=1) + reserved
    return order.astype(np.uint8), rng.integers(config.min_interests, config.max_interests + 1, num_users)


def draw_interests(
    rng: np.random.Generator,
    config: SimulateConfig,
    offsets: NDArray[np.int64],
    order: NDArray[np.uint8],
    num_slow: NDArray[np.int64],
) -> Interests:
    """Divide histories into episodes, and let the first `num_slow` topics of each user's order take turns."""
    num_events = int(offsets[-1])
    drawn = rng.gamma(4.0, config.episode_events / 4, num_draws(num_events, config.episode_events)).astype(np.int64) + 1
    start = stretch_starts(drawn, offsets)
    user = np.searchsorted(offsets, start, side="right") - 1
    ordinal = np.arange(len(start)) - np.searchsorted(start, offsets[:-1])[user]
    slow = num_slow[user]
    active = np.empty((len(start), 4), np.uint8)
    active[:, 0] = order[user, ordinal % slow]
    active[:, 1] = order[user, np.maximum(ordinal - 1, 0) % slow]
    active[:, 2:] = other_topics(rng, order, slow[:, None], user[:, None], (len(start), 2))
    return Interests(order, num_slow, start, ordinal, active)


def other_topics(
    rng: np.random.Generator, order: NDArray[np.uint8], slow: IntArray, user: IntArray, shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    """Topics drawn uniformly from those outside the user's slow interests; `slow` and `user` broadcast to `shape`."""
    column = slow + (rng.random(shape) * (order.shape[1] - slow)).astype(np.int64)
    return np.asarray(order[user, column])


def stretch_starts(drawn: IntArray, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """First events of stretches of the `drawn` lengths, laid over all users; each user's first event starts one too."""
    cuts = np.cumsum(drawn, dtype=np.int64)
    starts = np.concatenate([offsets[:-1], cuts[cuts < offsets[-1]]])
    starts.sort(kind="stable")
    return np.asarray(starts[np.concatenate([[True], starts[1:] != starts[:-1]])])


def num_draws(total: int, mean: float) -> int:
    """Number of stretches that surely cover `total` events: the expected number plus eight standard deviations."""
    expected = total / mean
    return int(expected + 8 * np.sqrt(expected) + 16)
