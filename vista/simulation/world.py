"""The generative model of the simulation: items and topics, users' interests in time, events, requests and labels.

docs/explanation/simulation.md describes it in words, with the formulas and the reference figures. Nothing here touches
files. All of it is NumPy over packed arrays, chunk by chunk of users. Every chunk has a random stream of its own, so
the bytes depend on the config alone (and on NumPy's version), never on threads.

Letters: U users of the chunk, T events, S sessions, E episodes, R requests, N impressions, K topics.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.config import SimulateConfig

IntArray = NDArray[np.integer[Any]]

TASKS = ("click", "like", "long_view")
ACTIONS = ("view", "like", "long_view")

RECENT_EVENTS = 32
"""Events that the recent term of the labels sees."""
AFFINITY_UNIT = 0.02
"""Share of a user's life that one unit of the logarithm in `affinity` stands for."""
AFFINITY_FULL = 0.15
"""Share of a life at which `affinity` is 1."""
AFFINITY_PRIOR = 20
"""Events added to the length of a life before shares are taken."""
LOGITS = np.array(
    [
        # bias, lifetime affinity, recent match, quality
        [-3.2, 3.6, 1.0, 0.3],  # click
        [-3.0, 3.0, 0.8, 0.5],  # like, of clicked impressions
        [-1.2, 1.8, 1.2, 0.3],  # long_view, of clicked impressions
    ]
)
"""[tasks, 4] coefficients of the label logits."""

SESSION_SHARES = (0.70, 0.10, 0.10, 0.10)
"""What a session is about: the episode's interest, the interest before it, or one of two passing topics."""
OFF_TOPIC = 0.15
"""Share of the events that leave their session's topic for any of the episode's four topics."""
ACTION_SHARES = np.array([[0.90, 0.03, 0.07], [0.68, 0.10, 0.22]])
"""[off topic, on topic] shares of the actions."""
NUM_PERIODS = 24
"""Equal periods of the simulated time; the order of popularity inside a topic changes from one to the next."""
DRIFT_MEMORY = 0.9
"""Correlation of an item's popularity with that of the period before."""
EVENT_GAP_MS = 45_000
"""Mean gap inside a session; shorter where the simulated time is too short for it."""
REQUEST_DELAY_MS = 60_000
"""Longest time between the last event before a request and the request."""


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Items, with what the models are not told: topic and quality; and the order of popularity in each period."""

    topic: NDArray[np.uint8]
    """[num_items]"""
    quality: NDArray[np.float32]
    """[num_items] standard normal."""
    ranked: NDArray[np.int32]
    """[NUM_PERIODS, num_items] items, topic after topic, most popular first."""
    topic_start: NDArray[np.int64]
    """[K+1] where a topic starts in a row of `ranked`."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Events and impressions of consecutive users, packed; items are rows of the catalogue."""

    item: NDArray[np.int32]
    timestamp: NDArray[np.int64]
    action: NDArray[np.uint8]
    impression_item: NDArray[np.int32]
    impression_timestamp: NDArray[np.int64]
    impression_position: NDArray[np.int64]
    """[N] events of the user strictly before the impression."""
    label: NDArray[np.int8]
    """[N, tasks] 0, 1, or -1 where unknown."""
    probability: NDArray[np.float32]
    """[N, tasks] true probability of 1; of like and long_view given a click."""
    decisive_age: NDArray[np.int64]


class TopicIndex:
    """Counts of a topic's events in any range of packed events, by binary search.

    Args:
        topic: [T] topics of the packed events.
    """

    def __init__(self, topic: NDArray[np.uint8]) -> None:
        self._stride = len(topic) + 1
        self._keys = topic.astype(np.int64)
        self._keys *= self._stride
        self._keys += np.arange(len(topic))
        self._keys.sort()

    def count(self, topic: IntArray, start: IntArray, stop: IntArray) -> NDArray[np.int64]:
        """Events of `topic` [N] among the packed events start..stop-1 [N]."""
        base = topic.astype(np.int64) * self._stride
        return np.asarray(np.searchsorted(self._keys, base + stop) - np.searchsorted(self._keys, base + start))

    def age(self, topic: IntArray, start: IntArray, stop: IntArray) -> NDArray[np.int64]:
        """Events of start..stop-1 that are newer than the newest one of `topic`; -1 where there is none. int64 [N]."""
        base = topic.astype(np.int64) * self._stride
        before = np.searchsorted(self._keys, base + stop)
        newest = self._keys[np.maximum(before - 1, 0)] - base
        return np.where((before > 0) & (newest >= start), stop - 1 - newest, -1)


def affinity(count: IntArray, num_events: IntArray) -> NDArray[np.float64]:
    """Lifetime affinity: the logarithm of a topic's share of a life, 0 without events, 1 at AFFINITY_FULL.

    Args:
        count: [N] events of the topic so far.
        num_events: [N] events so far.
    """
    share = count / (num_events + AFFINITY_PRIOR)
    return np.asarray(np.log1p(share / AFFINITY_UNIT) / np.log1p(AFFINITY_FULL / AFFINITY_UNIT))


def recent_match(count: IntArray) -> NDArray[np.float64]:
    """Recent match in 0..1 from the number [N] of a topic's events among the last RECENT_EVENTS."""
    return np.asarray(np.log1p(count) / np.log1p(RECENT_EVENTS))


def period(config: SimulateConfig) -> tuple[int, int]:
    """Start and end of the simulated time, int ms since 1970 (UTC)."""
    moment = datetime.fromisoformat(config.start)
    start = round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
    return start, start + round(config.days * 86_400_000)


def make_catalogue(config: SimulateConfig, seed: np.random.SeedSequence) -> Catalogue:
    """Draw topics (of equal size), qualities and drifting popularity for all items."""
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
    return Catalogue(topic, quality, ranked, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def make_chunk(
    config: SimulateConfig, catalogue: Catalogue, lengths: NDArray[np.int64], seed: np.random.SeedSequence
) -> Chunk:
    """Draw the lives of the users whose numbers of events are `lengths` [U], all at least 1."""
    rng = np.random.Generator(np.random.SFC64(seed))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    interests = _draw_interests(rng, config, offsets)
    events = _draw_events(rng, config, catalogue, offsets, interests)
    return _draw_impressions(rng, config, catalogue, offsets, interests, *events)


@dataclass(frozen=True, slots=True)
class _Interests:
    """Users' topics and the episodes of their lives."""

    order: NDArray[np.uint8]
    """[U, K] topics of a user: the slow interests in the order of their episodes, then all others."""
    num_slow: NDArray[np.int64]
    """[U]"""
    episode_start: NDArray[np.int64]
    """[E] packed index of the first event."""
    episode_ordinal: NDArray[np.int64]
    active: NDArray[np.uint8]
    """[E, 4] the episode's interest, the interest before it, two passing topics."""


@dataclass(frozen=True, slots=True)
class _Sessions:
    """Sessions, and the events' place in them."""

    of_event: NDArray[np.int64]
    episode: NDArray[np.int64]
    """[S]"""


def _segment_starts(drawn: IntArray, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """First events of segments of the `drawn` lengths laid over all users; each user's first event starts one too."""
    cuts = np.cumsum(drawn, dtype=np.int64)
    starts = np.concatenate([offsets[:-1], cuts[cuts < offsets[-1]]])
    starts.sort(kind="stable")
    return np.asarray(starts[np.concatenate([[True], starts[1:] != starts[:-1]])])


def _num_draws(total: int, mean: float) -> int:
    """Segments that surely cover `total` events: the expected number and eight standard deviations."""
    expected = total / mean
    return int(expected + 8 * np.sqrt(expected) + 16)


def _draw_interests(rng: np.random.Generator, config: SimulateConfig, offsets: NDArray[np.int64]) -> _Interests:
    num_users, num_events = len(offsets) - 1, int(offsets[-1])
    order = rng.random((num_users, config.num_topics), dtype=np.float32).argsort(axis=1).astype(np.uint8)
    num_slow = rng.integers(config.min_interests, config.max_interests + 1, num_users)
    drawn = (
        rng.gamma(4.0, config.episode_events / 4, _num_draws(num_events, config.episode_events)).astype(np.int64) + 1
    )
    start = _segment_starts(drawn, offsets)
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
    """Topics that are none of the user's slow interests, uniformly; `slow` and `user` broadcast to `shape`."""
    column = slow + (rng.random(shape) * (order.shape[1] - slow)).astype(np.int64)
    return np.asarray(order[user, column])


def _draw_events(
    rng: np.random.Generator,
    config: SimulateConfig,
    catalogue: Catalogue,
    offsets: NDArray[np.int64],
    interests: _Interests,
) -> tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.int64], NDArray[np.uint8], _Sessions]:
    """Topic, item, timestamp and action of every event [T], and the sessions."""
    num_events = int(offsets[-1])
    drawn = rng.geometric(1 / config.session_events, _num_draws(num_events, config.session_events))
    start = _segment_starts(drawn, offsets)
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
    item = _draw_items(rng, config, catalogue, topic, timestamp[start], of_event)
    return topic, item, timestamp, action, _Sessions(of_event, episode)


def _draw_items(
    rng: np.random.Generator,
    config: SimulateConfig,
    catalogue: Catalogue,
    topic: NDArray[np.uint8],
    time: NDArray[np.int64],
    of_event: NDArray[np.int64] | None = None,
) -> NDArray[np.int32]:
    """Items of the topics [T], by the popularity at `time` ([T], or [S] with the session of each event).

    The rank r inside a topic of n items has probability log((r+2)/(r+1)) / log(n+1): Zipf-like, exponent near 1.
    """
    begin, end = period(config)
    row = np.clip((time - begin) * NUM_PERIODS // (end - begin), 0, NUM_PERIODS - 1) * config.num_items
    index = row if of_event is None else row[of_event]
    size = np.diff(catalogue.topic_start)
    rank = np.exp(rng.random(len(topic), dtype=np.float32) * np.log(size + 1).astype(np.float32)[topic]).astype(
        np.int64
    )
    rank = np.clip(rank - 1, 0, (size - 1)[topic])
    return np.asarray(catalogue.ranked.reshape(-1)[index + catalogue.topic_start[topic] + rank])


def _draw_times(
    rng: np.random.Generator,
    config: SimulateConfig,
    offsets: NDArray[np.int64],
    session_start: NDArray[np.int64],
    of_event: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Strictly rising int64 ms [T] a user: lives fill the period, sessions lie apart by uneven gaps."""
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
    catalogue: Catalogue,
    offsets: NDArray[np.int64],
    interests: _Interests,
    topic: NDArray[np.uint8],
    item: NDArray[np.int32],
    timestamp: NDArray[np.int64],
    action: NDArray[np.uint8],
    sessions: _Sessions,
) -> Chunk:
    """Requests spread over each life, their candidates, and the labels."""
    lengths = np.diff(offsets)
    user, time, stop = _draw_requests(rng, config, offsets, timestamp)
    episode = sessions.episode[sessions.of_event[stop - 1]]
    user, time, stop, episode = (np.repeat(x, config.impressions_per_request) for x in (user, time, stop, episode))
    if config.impressions_per_request > 1:  # the last request of a user may be a shorter one
        keep = np.arange(len(user)) % (len(user) // len(lengths)) < config.impressions_per_user
        user, time, stop, episode = user[keep], time[keep], stop[keep], episode[keep]

    candidate = _draw_candidates(rng, interests, user, episode)
    chosen = _draw_items(rng, config, catalogue, candidate, time)
    index = TopicIndex(topic)
    start = offsets[user]
    lifetime = affinity(index.count(candidate, start, stop), stop - start)
    recent = recent_match(index.count(candidate, np.maximum(start, stop - RECENT_EVENTS), stop))
    features = np.stack([np.ones(len(user)), lifetime, recent, catalogue.quality[chosen]], axis=1)
    probability = (1 / (1 + np.exp(-(features @ LOGITS.T)))).astype(np.float32)
    label = (rng.random(probability.shape, dtype=np.float32) < probability).astype(np.int8)
    label[:, 1:][label[:, 0] == 0] = -1
    age = index.age(candidate, start, stop)
    return Chunk(item, timestamp, action, chosen, time, stop - start, label, probability, age)


def _draw_requests(
    rng: np.random.Generator, config: SimulateConfig, offsets: NDArray[np.int64], timestamp: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """User, time, and packed index of the first event not before the request, [R] each, sorted by user and time."""
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
    """Topics [N]: a third dormant slow interests, a third current ones, a third topics of no lasting interest."""
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
