"""The packed events of a chunk of users: sessions, items, times, actions, and things that recur."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.config import SimulateConfig
from vista.simulation.catalog import Catalog, draw_items
from vista.simulation.interests import Interests, num_draws, stretch_starts
from vista.simulation.period import period

ACTIONS = ("view", "like", "long_view")

SESSION_SHARES = (0.70, 0.10, 0.10, 0.10)
"""Probabilities of a session's topic: the episode's interest, the previous one, or either of two passing topics."""
OFF_TOPIC = 0.15
"""Share of events whose topic is drawn from the episode's four topics instead of being the session's topic."""
ACTION_SHARES = np.array([[0.90, 0.03, 0.07], [0.68, 0.10, 0.22]])
"""[off topic, on topic] by action: probabilities of `ACTIONS`."""
EVENT_GAP_MS = 45_000
"""Mean gap within a session; shorter if the simulated period is too short for it."""
REQUEST_DELAY_MS = 60_000
"""Maximum time between a request and the last event before it."""


@dataclass(frozen=True, slots=True)
class EventStream:
    """The packed events of the chunk's users."""

    item: NDArray[np.int32]
    """[T]"""
    timestamp: NDArray[np.int64]
    """[T] ms"""
    action: NDArray[np.uint8]
    """[T] codes of `ACTIONS`."""


def draw_sessions(
    rng: np.random.Generator, config: SimulateConfig, offsets: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First events [S] of the sessions, and the session of each event [T]."""
    num_events = int(offsets[-1])
    drawn = rng.geometric(1 / config.session_events, num_draws(num_events, config.session_events))
    start = stretch_starts(drawn, offsets)
    return start, np.repeat(np.arange(len(start)), np.diff(np.append(start, num_events)))


def draw_events(
    rng: np.random.Generator,
    config: SimulateConfig,
    catalog: Catalog,
    offsets: NDArray[np.int64],
    interests: Interests,
) -> tuple[EventStream, NDArray[np.int64]]:
    """Draw sessions about the episodes' topics: the events, and the episode of each event's session [T]."""
    num_events = int(offsets[-1])
    start, of_event = draw_sessions(rng, config, offsets)
    episode = np.searchsorted(interests.episode_start, start, side="right") - 1
    about = np.searchsorted(np.cumsum(SESSION_SHARES)[:-1], rng.random(len(start)), side="right")
    session_topic = interests.active[episode, about]

    draw = rng.random(num_events, dtype=np.float32)
    off_topic = draw < OFF_TOPIC
    stray = np.flatnonzero(off_topic)
    slot = np.minimum((draw[stray] * (4 / OFF_TOPIC)).astype(np.int64), 3)
    topic = session_topic[of_event]
    topic[stray] = interests.active[episode[of_event[stray]], slot]

    action = draw_actions(rng, ~off_topic)
    timestamp = draw_times(rng, config, offsets, start, of_event)
    item = draw_items(rng, config, catalog, topic, timestamp[start], of_event)
    return EventStream(item, timestamp, action), episode[of_event]


def draw_actions(rng: np.random.Generator, on_topic: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Codes of `ACTIONS` [T]: likes and long views are more frequent on the session's topic."""
    limits = np.cumsum(ACTION_SHARES, axis=1).astype(np.float32)
    draw = rng.random(len(on_topic), dtype=np.float32)
    row = on_topic.view(np.uint8)
    return np.asarray((draw > limits[:, 0][row]).view(np.uint8) + (draw > limits[:, 1][row]).view(np.uint8))


def draw_times(
    rng: np.random.Generator,
    config: SimulateConfig,
    offsets: NDArray[np.int64],
    session_start: NDArray[np.int64],
    of_event: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Times, int64 ms [T], strictly rising per user: histories fill the period, with uneven gaps between sessions."""
    begin, end = period(config)
    num_users, span = len(offsets) - 1, end - begin
    first = begin + 1 + (rng.random(num_users) * 0.05 * span).astype(np.int64)
    last = end - REQUEST_DELAY_MS - (rng.random(num_users) * 0.01 * span).astype(np.int64)
    room = last - first
    mean_gap = np.minimum(EVENT_GAP_MS, 0.5 * room / np.diff(offsets))
    user_of_session = np.searchsorted(offsets, session_start, side="right") - 1
    gap = (
        rng.standard_exponential(len(of_event), dtype=np.float32)
        * mean_gap.astype(np.float32)[user_of_session][of_event]
    )
    step = gap.astype(np.int64)
    step += 2
    step[session_start] = 2
    within = np.add.reduceat(step, offsets[:-1])
    weight = rng.gamma(0.5, 1.0, len(session_start))
    weight[np.searchsorted(session_start, offsets[:-1])] = 0
    total = np.bincount(user_of_session, weight, num_users)
    free = np.maximum(room - within, 0) / np.maximum(total, 1e-9)
    step[session_start] = (free[user_of_session] * weight).astype(np.int64) + 2
    step[offsets[:-1]] = 0
    time = np.cumsum(step)
    time += np.repeat(first - time[offsets[:-1]], np.diff(offsets))
    return np.asarray(time)


def log_uniform(rng: np.random.Generator, limits: tuple[float, float], count: int) -> NDArray[np.float64]:
    """Numbers [count] whose logarithms are uniform between those of the limits."""
    return np.exp(rng.uniform(np.log(limits[0]), np.log(limits[1]), count))


def recurring_events(
    rng: np.random.Generator, mean_gap: NDArray[np.float64], length: NDArray[np.int64], jitter: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions at which things recur: (row, position) of each occurrence, sorted by row and position.

    Args:
        mean_gap: [M] mean number of events from one occurrence of a row to the next; the first comes within one gap.
        length: [M] number of events of the row's user; positions are below it.
        jitter: standard deviation of a gap, as a share of its mean. Gaps are at least half the mean.
    """
    most = int(np.max(2 * length / mean_gap, initial=0)) + 2
    gaps = np.maximum(1 + jitter * rng.standard_normal((len(mean_gap), most)), 0.5)
    gaps[:, 0] = rng.random(len(mean_gap))
    position = np.floor(np.cumsum(gaps, axis=1) * mean_gap[:, None]).astype(np.int64)
    row, column = np.nonzero(position < length[:, None])
    return row, position[row, column]
