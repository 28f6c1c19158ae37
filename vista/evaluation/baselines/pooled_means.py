"""Means of item vectors over histories, and item vectors without training.

Letters: n users, T events, M columns of the vectors, K means, V items.
"""

from __future__ import annotations

import numpy as np

from vista.arrays import Floats, Int
from vista.examples.item_factors import item_factors
from vista.log.event_log import EventLog

_LAST = (32, 200)
_DECAY = 200
NUM_MEANS = len(_LAST) + 2
ALL_EVENTS = len(_LAST)
"""Place of the mean over all events."""


def mean_weights(age: Int) -> Floats:
    """float64 [K, T]: the weights of events with `age` int64 [T] newer ones. The means are over the last 32, the last
    200, and all events, and the last one decays by the factor e over 200 events."""
    return np.stack([*(age < last for last in _LAST), np.ones(len(age)), np.exp(-age / _DECAY)])


def pooled_means(log: EventLog, vectors: Floats, user: Int, seen: Int) -> Floats:
    """Means of `vectors` float64 [V, M] over the first `seen` events of users [n]: float64 [K, n, M] of length 1.

    Users without events have 0.
    """
    events = log.gather(user, seen, features=False)
    # One more row, because reduceat needs an event after the last offset.
    of_events = np.append(vectors[events.item], np.zeros((1, vectors.shape[1])), axis=0)
    empty = np.diff(events.offsets) == 0
    means = []
    for weight in mean_weights(events.age):
        weighted = of_events * np.append(weight, 0)[:, None]
        total = np.add.reduceat(weighted, events.offsets[:-1])
        total[empty] = 0  # reduceat gives the next user's first event there
        means.append(_unit(total))
    return np.stack(means)


def factor_vectors(log: EventLog, counts: Int, dim: int, seed: int) -> Floats:
    """`item_factors` of all items from their first `counts` events: float64 [V, dim] of length 1.

    Items without factors have 0.
    """
    rows, factors = item_factors(log, np.arange(log.num_items) + 1, counts, dim, seed=seed)
    vectors = np.zeros((log.num_items, dim))
    vectors[rows - 1] = _unit(factors.astype(np.float64))
    return vectors


def _unit(vectors: Floats) -> Floats:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)
