"""The generative model of the simulation: users' interests over time, events, requests, and labels.

docs/explanation/simulation.md describes it in words, with the formulas and the reference figures. Nothing here touches
files. All code is NumPy over packed arrays, one chunk of users at a time. Every chunk has its own random stream, so the
bytes depend only on the config (and on NumPy's version), never on the number of threads.

Letters: U users of the chunk, T events, S sessions, E episodes, R requests, N impressions, K topics.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.config import SimulateConfig
from vista.simulation.catalog import Catalog, draw_items
from vista.simulation.period import period
from vista.simulation.simulated_log import SimulatedChunk
from vista.simulation.topic_index import IntArray, TopicIndex

TASKS = ("click", "like", "long_view")
ACTIONS = ("view", "like", "long_view")

RECENT_EVENTS = 32
"""Number of newest events that `recent_match` counts."""
AFFINITY_UNIT = 0.02
"""Share of a history that corresponds to one unit inside the logarithm of `affinity`."""
AFFINITY_FULL = 0.15
"""Share of a history at which `affinity` is 1."""
AFFINITY_PRIOR = 20
"""Events added to the length of a history before the share is computed."""
LOGITS = np.array(
    [
        # bias, long-term affinity, recent match, quality
        [-3.2, 3.6, 1.0, 0.3],  # click
        [-3.0, 3.0, 0.8, 0.5],  # like, of clicked impressions
        [-1.2, 1.8, 1.2, 0.3],  # long_view, of clicked impressions
    ]
)
"""[tasks, 4] coefficients of the label logits."""

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


def affinity(count: IntArray, num_events: IntArray) -> NDArray[np.float64]:
    """Long-term affinity: a log-scaled share of the history, 0 without events of the topic, 1 at AFFINITY_FULL.

    Args:
        count: [N] events of the topic so far.
        num_events: [N] events so far.
    """
    share = count / (num_events + AFFINITY_PRIOR)
    return np.asarray(np.log1p(share / AFFINITY_UNIT) / np.log1p(AFFINITY_FULL / AFFINITY_UNIT))


def recent_match(count: IntArray) -> NDArray[np.float64]:
    """Recent match in [0, 1] from the number [N] of a topic's events among the last RECENT_EVENTS."""
    return np.asarray(np.log1p(count) / np.log1p(RECENT_EVENTS))


def make_chunk(
    config: SimulateConfig, catalog: Catalog, lengths: NDArray[np.int64], seed: np.random.SeedSequence
) -> SimulatedChunk:
    """Draw the events and impressions of users with `lengths` [U] events, each at least 1."""
    rng = np.random.Generator(np.random.SFC64(seed))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    interests = _draw_interests(rng, config, offsets)
    events = _draw_events(rng, config, catalog, offsets, interests)
    return _draw_impressions(rng, config, catalog, offsets, interests, events)


@dataclass(frozen=True, slots=True)
class _Interests:
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


@dataclass(frozen=True, slots=True)
class _Events:
    """The packed events of the chunk's users."""

    topic: NDArray[np.uint8]
    """[T]"""
    item: NDArray[np.int32]
    """[T]"""
    timestamp: NDArray[np.int64]
    """[T] ms"""
    action: NDArray[np.uint8]
    """[T]"""
    episode: NDArray[np.int64]
    """[T] episode of the event's session."""


def _stretch_starts(drawn: IntArray, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """First events of stretches of the `drawn` lengths, laid over all users; each user's first event starts one too."""
    cuts = np.cumsum(drawn, dtype=np.int64)
    starts = np.concatenate([offsets[:-1], cuts[cuts < offsets[-1]]])
    starts.sort(kind="stable")
    return np.asarray(starts[np.concatenate([[True], starts[1:] != starts[:-1]])])


def _num_draws(total: int, mean: float) -> int:
    """Number of stretches that surely cover `total` events: the expected number plus eight standard deviations."""
    expected = total / mean
    return int(expected + 8 * np.sqrt(expected) + 16)


def _draw_interests(rng: np.random.Generator, config: SimulateConfig, offsets: NDArray[np.int64]) -> _Interests:
    num_users, num_events = len(offsets) - 1, int(offsets[-1])
    order = rng.random((num_users, config.num_topics), dtype=np.float32).argsort(axis=1).astype(np.uint8)
    num_slow = rng.integers(config.min_interests, config.max_interests + 1, num_users)
    drawn = (
        rng.gamma(4.0, config.episode_events / 4, _num_draws(num_events, config.episode_events)).astype(np.int64) + 1
    )
    start = _stretch_starts(drawn, offsets)
    user = np.searchsorted(offsets, start, side="right") - 1
    ordinal = np.arange(len(start)) - np.searchsorted(start, offsets[:-1])[user]
    slow = num_slow[user]
    active = np.empty((len(start), 4), np.uint8)
    active[:, 0] = order[user, ordinal % slow]
    active[:, 1] = order[user, np.maximum(ordinal - 1, 0) % slow]
    active[:, 2:] = _other_topics(rng, order, slow[:, None], user[:, None], (len(start), 2))
    return _Interests(order, num_slow, start, ordinal, active)


def _other_topics(
    rng: np.random.Generator, order: NDArray[np.uint8], slow: IntArray, user: IntArray, shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    """Topics drawn uniformly from those outside the user's slow interests; `slow` and `user` broadcast to `shape`."""
    column = slow + (rng.random(shape) * (order.shape[1] - slow)).astype(np.int64)
    return np.asarray(order[user, column])


def _draw_events(
    rng: np.random.Generator,
    config: SimulateConfig,
    catalog: Catalog,
    offsets: NDArray[np.int64],
    interests: _Interests,
) -> _Events:
    num_events = int(offsets[-1])
    drawn = rng.geometric(1 / config.session_events, _num_draws(num_events, config.session_events))
    start = _stretch_starts(drawn, offsets)
    size = np.diff(np.append(start, num_events))
    of_event = np.repeat(np.arange(len(start)), size)
    episode = np.searchsorted(interests.episode_start, start, side="right") - 1
    about = np.searchsorted(np.cumsum(SESSION_SHARES)[:-1], rng.random(len(start)), side="right")
    session_topic = interests.active[episode, about]

    draw = rng.random(num_events, dtype=np.float32)
    off_topic = draw < OFF_TOPIC
    stray = np.flatnonzero(off_topic)
    slot = np.minimum((draw[stray] * (4 / OFF_TOPIC)).astype(np.int64), 3)
    topic = session_topic[of_event]
    topic[stray] = interests.active[episode[of_event[stray]], slot]

    limits = np.cumsum(ACTION_SHARES, axis=1).astype(np.float32)
    draw = rng.random(num_events, dtype=np.float32)
    on_topic = (~off_topic).view(np.uint8)
    action = (draw > limits[:, 0][on_topic]).view(np.uint8) + (draw > limits[:, 1][on_topic]).view(np.uint8)

    timestamp = _draw_times(rng, config, offsets, start, of_event)
    item = draw_items(rng, config, catalog, topic, timestamp[start], of_event)
    return _Events(topic, item, timestamp, action, episode[of_event])


def _draw_times(
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


def _draw_impressions(
    rng: np.random.Generator,
    config: SimulateConfig,
    catalog: Catalog,
    offsets: NDArray[np.int64],
    interests: _Interests,
    events: _Events,
) -> SimulatedChunk:
    """Draw requests spread over each history, their candidates, and the labels."""
    lengths = np.diff(offsets)
    user, time, stop = _draw_requests(rng, config, offsets, events.timestamp)
    episode = events.episode[stop - 1]
    user, time, stop, episode = (np.repeat(x, config.impressions_per_request) for x in (user, time, stop, episode))
    if config.impressions_per_request > 1:  # a user's last request may have fewer
        keep = np.arange(len(user)) % (len(user) // len(lengths)) < config.impressions_per_user
        user, time, stop, episode = user[keep], time[keep], stop[keep], episode[keep]

    candidate = _draw_candidates(rng, interests, user, episode)
    chosen = draw_items(rng, config, catalog, candidate, time)
    index = TopicIndex(events.topic)
    start = offsets[user]
    long_term = affinity(index.count(candidate, start, stop), stop - start)
    recent = recent_match(index.count(candidate, np.maximum(start, stop - RECENT_EVENTS), stop))
    features = np.stack([np.ones(len(user)), long_term, recent, catalog.quality[chosen]], axis=1)
    probability = (1 / (1 + np.exp(-(features @ LOGITS.T)))).astype(np.float32)
    label = (rng.random(probability.shape, dtype=np.float32) < probability).astype(np.int8)
    label[:, 1:][label[:, 0] == 0] = -1
    age = index.age(candidate, start, stop)
    return SimulatedChunk(
        events.item, events.timestamp, events.action, chosen, time, stop - start, label, probability, age
    )


def _draw_requests(
    rng: np.random.Generator, config: SimulateConfig, offsets: NDArray[np.int64], timestamp: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(user, time, packed index of the first event not before the request), [R] each, sorted by user and time."""
    lengths = np.diff(offsets)
    per_user = -(-config.impressions_per_user // config.impressions_per_request)
    user = np.repeat(np.arange(len(lengths)), per_user)
    stop = offsets[user] + 1 + (rng.random(len(user)) * lengths[user]).astype(np.int64)
    following = np.where(
        stop < offsets[user + 1], timestamp[np.minimum(stop, len(timestamp) - 1)], np.iinfo(np.int64).max
    )
    delay = np.minimum(following - timestamp[stop - 1], REQUEST_DELAY_MS)
    time = timestamp[stop - 1] + 1 + (rng.random(len(user)) * (delay - 1)).astype(np.int64)
    order = np.lexsort((time, user))
    return user, time[order], stop[order]


def _draw_candidates(
    rng: np.random.Generator, interests: _Interests, user: NDArray[np.int64], episode: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Topics [N]: a third dormant slow interests, a third current ones, a third without lasting interest."""
    slow, ordinal = interests.num_slow[user], interests.episode_ordinal[episode]
    kind = rng.integers(0, 3, len(user))
    passing = interests.active[episode, 2 + rng.integers(0, 2, len(user))]
    other = _other_topics(rng, interests.order, slow, user, (len(user),))
    topic = np.where(rng.random(len(user)) < 0.3, passing, other)
    current = interests.active[episode, (rng.random(len(user)) < 0.3).astype(np.int64)]
    topic = np.where(kind == 1, current, topic)
    num_dormant = np.minimum(ordinal + 1, slow) - 2
    back = 2 + (rng.random(len(user)) * np.maximum(num_dormant, 1)).astype(np.int64)
    dormant = interests.order[user, (ordinal - back) % slow]
    return np.asarray(np.where((kind == 0) & (num_dormant > 0), dormant, topic))
