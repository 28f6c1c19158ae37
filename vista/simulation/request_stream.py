"""Requests that show candidates to a chunk of users."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.config import SimulateConfig
from vista.simulation.event_stream import REQUEST_DELAY_MS


@dataclass(frozen=True, slots=True)
class RequestStream:
    """When candidates are shown, one row per candidate, sorted by user and time."""

    user: NDArray[np.int64]
    """[N] rows of the chunk's users."""
    time: NDArray[np.int64]
    """[N] ms"""
    stop: NDArray[np.int64]
    """[N] packed index after the last event before the request."""


def draw_requests(
    rng: np.random.Generator,
    config: SimulateConfig,
    offsets: NDArray[np.int64],
    timestamp: NDArray[np.int64],
    after: NDArray[np.bool_] | None = None,
) -> RequestStream:
    """Draw requests uniformly over each history, and repeat each for its candidates.

    With `after` [T], a request moves back until it directly follows one of these events, if the user has any before.
    """
    lengths = np.diff(offsets)
    per_user = -(-config.impressions_per_user // config.impressions_per_request)
    user = np.repeat(np.arange(len(lengths)), per_user)
    stop = offsets[user] + 1 + (rng.random(len(user)) * lengths[user]).astype(np.int64)
    if after is not None:
        newest = np.maximum.accumulate(np.where(after, np.arange(len(after)), -1))[stop - 1]
        stop = np.where(newest >= offsets[user], newest + 1, stop)
    following = np.where(
        stop < offsets[user + 1], timestamp[np.minimum(stop, len(timestamp) - 1)], np.iinfo(np.int64).max
    )
    delay = np.minimum(following - timestamp[stop - 1], REQUEST_DELAY_MS)
    time = timestamp[stop - 1] + 1 + (rng.random(len(user)) * (delay - 1)).astype(np.int64)
    order = np.lexsort((time, user))
    user, time, stop = (np.repeat(x, config.impressions_per_request) for x in (user, time[order], stop[order]))
    if config.impressions_per_request > 1:  # a user's last request may have fewer
        keep = np.arange(len(user)) % (len(user) // len(lengths)) < config.impressions_per_user
        user, time, stop = user[keep], time[keep], stop[keep]
    return RequestStream(user, time, stop)
