"""The packed events of a chunk of users: sessions, items, times, actions, and things that recur."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.random import SFC64, Generator, SeedSequence
from numpy.typing import NDArray

from vista.arrays import Floats, Int, offsets_of
from vista.config import SimulateConfig
from vista.log.histories import DAY_MS

VALIDATION_SHARE, TEST_SHARE = 0.70, 0.85
"""Shares of the period after which validation and test labels begin."""


def period(config: SimulateConfig) -> tuple[int, int]:
    """Start and end of the simulated period, int ms since 1970 (UTC)."""
    first = datetime.fromisoformat(config.start)
    start = round((first if first.tzinfo else first.replace(tzinfo=UTC)).timestamp() * 1000)
    return start, start + round(config.days * DAY_MS)


def split_times(config: SimulateConfig) -> tuple[int, int]:
    """Times (int ms) at which validation and test labels begin: after 70% and 85% of the period."""
    start, end = period(config)
    return start + int(VALIDATION_SHARE * (end - start)), start + int(TEST_SHARE * (end - start))


# The simulated items: their topics, their quality, and their popularity as it drifts.

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
    """[NUM_PERIODS, num_items] items grouped by topic, most popular first; those that do not exist yet come last."""
    topic_start: Int
    """[K + 1] where each topic starts in a row of `ranked`."""
    birth: Int
    """[num_items] the part of the period from which on an item exists."""
    topic_size: Int
    """[NUM_PERIODS, K] items of each topic that exist."""


def make_catalog(config: SimulateConfig, seed: SeedSequence) -> Catalog:
    """Draw topics of equal size, qualities, and drifting popularity for all items."""
    rng = Generator(SFC64(seed))
    topic = rng.permutation(np.arange(config.num_items) % config.num_topics).astype(np.uint8)
    quality = rng.standard_normal(config.num_items, dtype=np.float32)
    ranked = np.empty((NUM_PERIODS, config.num_items), np.int32)
    popularity = rng.standard_normal(config.num_items)
    birth = _births(config, topic, Generator(SFC64(seed.spawn(1)[0])))
    for index in range(NUM_PERIODS):
        ranked[index] = np.lexsort((-popularity, birth > index, topic))
        noise = rng.standard_normal(config.num_items)
        popularity = DRIFT_MEMORY * popularity + np.sqrt(1 - DRIFT_MEMORY**2) * noise
    sizes = np.bincount(topic, minlength=config.num_topics)
    exists = birth <= np.arange(NUM_PERIODS)[:, None]
    size = np.stack([np.bincount(topic[row], minlength=config.num_topics) for row in exists])
    return Catalog(topic, quality, ranked, offsets_of(sizes), birth, size)


def _births(config: SimulateConfig, topic: NDArray[np.uint8], rng: Generator) -> Int:
    """The part of the period [num_items] from which on each item exists.

    The first item of each topic exists from the start, like all items of topic 0, which special events use.
    """
    is_new = rng.random(len(topic)) < config.new_items
    is_new[np.unique(topic, return_index=True)[1]] = False
    return np.where(is_new & (topic > 0), rng.integers(1, NUM_PERIODS, len(topic)), 0)


def period_of(config: SimulateConfig, time: Int) -> Int:
    """Row [N] of `Catalog.ranked` at times [N], ms."""
    begin, end = period(config)
    return np.clip((time - begin) * NUM_PERIODS // (end - begin), 0, NUM_PERIODS - 1)


def draw_items(
    rng: Generator,
    config: SimulateConfig,
    catalog: Catalog,
    topic: NDArray[np.uint8],
    time: Int,
    of_event: Int | None = None,
) -> NDArray[np.int32]:
    """Draw an item for each of the topics [T] by popularity at `time`.

    `time` is [T], or [S] with `of_event` [T] as indices into it. Rank r within a topic of n items has probability
    log((r+2)/(r+1)) / log(n+1): Zipf-like, with exponent near 1.
    """
    row = period_of(config, time)
    row = row if of_event is None else row[of_event]
    size = catalog.topic_size
    log_size = np.log(size + 1).astype(np.float32)[row, topic]
    rank = np.exp(rng.random(len(topic), dtype=np.float32) * log_size).astype(np.int64)
    rank = np.clip(rank - 1, 0, (size - 1)[row, topic])
    return np.asarray(catalog.ranked.reshape(-1)[row * config.num_items + catalog.topic_start[topic] + rank])


IntArray = NDArray[np.integer[Any]]


class TopicIndex:
    """Finds the events of a topic, or of any other key such as an item, in ranges of packed events by binary search.

    Args:
        topic: [T] topics or other keys of the packed events, at least 0.
    """

    def __init__(self, topic: IntArray) -> None:
        self._stride = len(topic) + 1
        self._keys = topic.astype(np.int64)
        self._keys *= self._stride
        self._keys += np.arange(len(topic))
        self._keys.sort()

    def count(self, topic: IntArray, start: IntArray, stop: IntArray) -> Int:
        """Events of `topic` [N] among the packed events start..stop-1 [N]."""
        base = topic.astype(np.int64) * self._stride
        return np.asarray(np.searchsorted(self._keys, base + stop) - np.searchsorted(self._keys, base + start))

    def age(self, topic: IntArray, start: IntArray, stop: IntArray) -> Int:
        """Events of start..stop-1 newer than the newest event of `topic`: int64 [N], -1 if there is no such event."""
        base = topic.astype(np.int64) * self._stride
        before = np.searchsorted(self._keys, base + stop)
        newest = self._keys[np.maximum(before - 1, 0)] - base
        return np.where((before > 0) & (newest >= start), stop - 1 - newest, -1)

    def first(self, topic: IntArray, start: IntArray, stop: IntArray) -> Int:
        """Packed index of the oldest event of `topic` [N] among start..stop-1: int64 [N], `stop` if there is none."""
        base = topic.astype(np.int64) * self._stride
        at = np.searchsorted(self._keys, base + start)
        oldest = self._keys[np.minimum(at, len(self._keys) - 1)] - base
        return np.where(at < len(self._keys), np.minimum(oldest, stop), stop)


# Users' topics, and the episodes in which their slow interests take turns.
#
# All code is NumPy over packed arrays, one chunk of users at a time. Every chunk has its own random stream, so the
# bytes depend only on the config (and on NumPy's version), never on the number of threads.
#
# Letters: U users of the chunk, T events, S sessions, E episodes, R requests, N impressions, K topics.


@dataclass(frozen=True, slots=True)
class Interests:
    """Users' topics, and the episodes of their histories."""

    order: NDArray[np.uint8]
    """[U, K] each user's topics: first the slow interests in the order of their episodes, then all others."""
    num_slow: Int
    """[U] number of slow interests."""
    episode_start: Int
    """[E] packed index of the first event."""
    episode_ordinal: Int
    """[E] 0-based number of the episode within its user."""
    active: NDArray[np.uint8]
    """[E, 4] the episode's interest, the previous interest, two passing topics."""


def draw_orders(
    rng: Generator, config: SimulateConfig, num_users: int, reserved: int = 0
) -> tuple[NDArray[np.uint8], Int]:
    """Draw each user's order of topics and number of slow interests.

    Returns:
        Topics uint8 [U, K - reserved] in random order, without the first `reserved`, and numbers int64 [U].
    """
    order = rng.random((num_users, config.num_topics - reserved), dtype=np.float32).argsort(axis=1) + reserved
    return order.astype(np.uint8), rng.integers(config.min_interests, config.max_interests + 1, num_users)


def draw_interests(
    rng: Generator, config: SimulateConfig, offsets: Int, order: NDArray[np.uint8], num_slow: Int
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
    rng: Generator, order: NDArray[np.uint8], slow: IntArray, user: IntArray, shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    """Topics drawn uniformly from those outside the user's slow interests; `slow` and `user` broadcast to `shape`."""
    column = slow + (rng.random(shape) * (order.shape[1] - slow)).astype(np.int64)
    return np.asarray(order[user, column])


def stretch_starts(drawn: IntArray, offsets: Int) -> Int:
    """First events of stretches of the `drawn` lengths, laid over all users; each user's first event starts one too."""
    cuts = np.cumsum(drawn, dtype=np.int64)
    starts = np.concatenate([offsets[:-1], cuts[cuts < offsets[-1]]])
    starts.sort(kind="stable")
    return np.asarray(starts[np.concatenate([[True], starts[1:] != starts[:-1]])])


def num_draws(total: int, mean: float) -> int:
    """Number of stretches that surely cover `total` events: the expected number plus eight standard deviations."""
    expected = total / mean
    return int(expected + 8 * np.sqrt(expected) + 16)


ACTIONS = ("view", "like", "long_view")

SESSION_SHARES = (0.70, 0.10, 0.10, 0.10)
"""Probabilities of a session's topic: the episode's interest, the previous one, or either of two passing topics."""
OFF_TOPIC = 0.15
"""Share of events whose topic is drawn from the episode's four topics instead of being the session's topic."""
ACTION_SHARES = np.array([[0.90, 0.03, 0.07], [0.68, 0.10, 0.22]])
"""[off topic, on topic] by action: probabilities of `ACTIONS`."""
EVENT_GAP_MS = 45_000
"""Mean gap within a session; shorter if the simulated period is too short for it."""
IMPRESSIONS_PER_REQUEST = 4
"""Candidates that are shown at the same time."""
REQUEST_DELAY_MS = 60_000
"""Maximum time between a request and the last event before it."""


@dataclass(frozen=True, slots=True)
class EventStream:
    """The packed events of the chunk's users."""

    item: NDArray[np.int32]
    """[T]"""
    timestamp: Int
    """[T] ms"""
    action: NDArray[np.uint8]
    """[T] codes of `ACTIONS`."""


def draw_sessions(rng: Generator, config: SimulateConfig, offsets: Int) -> tuple[Int, Int]:
    """First events [S] of the sessions, and the session of each event [T]."""
    num_events = int(offsets[-1])
    drawn = rng.geometric(1 / config.session_events, num_draws(num_events, config.session_events))
    start = stretch_starts(drawn, offsets)
    return start, np.repeat(np.arange(len(start)), np.diff(np.append(start, num_events)))


def draw_events(
    rng: Generator, config: SimulateConfig, catalog: Catalog, offsets: Int, interests: Interests
) -> tuple[EventStream, Int]:
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


def draw_actions(rng: Generator, on_topic: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Codes of `ACTIONS` [T]: likes and long views are more frequent on the session's topic."""
    limits = np.cumsum(ACTION_SHARES, axis=1).astype(np.float32)
    draw = rng.random(len(on_topic), dtype=np.float32)
    row = on_topic.view(np.uint8)
    return np.asarray((draw > limits[:, 0][row]).view(np.uint8) + (draw > limits[:, 1][row]).view(np.uint8))


def draw_times(rng: Generator, config: SimulateConfig, offsets: Int, session_start: Int, of_event: Int) -> Int:
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


def log_uniform(rng: Generator, limits: tuple[float, float], count: int) -> Floats:
    """Numbers [count] whose logarithms are uniform between those of the limits."""
    return np.exp(rng.uniform(np.log(limits[0]), np.log(limits[1]), count))


def recurring_events(rng: Generator, mean_gap: Floats, length: Int, jitter: float) -> tuple[Int, Int]:
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


@dataclass(frozen=True, slots=True)
class RequestStream:
    """When candidates are shown, one row per candidate, sorted by user and time."""

    user: Int
    """[N] rows of the chunk's users."""
    time: Int
    """[N] ms"""
    stop: Int
    """[N] packed index after the last event before the request."""


def draw_requests(
    rng: Generator, config: SimulateConfig, offsets: Int, timestamp: Int, after: NDArray[np.bool_] | None = None
) -> RequestStream:
    """Draw requests uniformly over each history, and repeat each for its candidates.

    With `after` [T], a request moves back until it directly follows one of these events, if the user has any before.
    """
    lengths = np.diff(offsets)
    per_user = -(-config.impressions_per_user // IMPRESSIONS_PER_REQUEST)
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
    user, time, stop = (np.repeat(x, IMPRESSIONS_PER_REQUEST) for x in (user, time[order], stop[order]))
    keep = np.arange(len(user)) % (len(user) // len(lengths)) < config.impressions_per_user  # the last may have fewer
    return RequestStream(user[keep], time[keep], stop[keep])


PLACE_NOISE = 0.5
"""Standard deviation of the noise that is added to the logarithm of an item's popularity rank in its topic, before the
items of a list are put in order."""


def places_by_popularity(
    rng: Generator, config: SimulateConfig, catalog: Catalog, requests: RequestStream, item: NDArray[np.int32]
) -> Int:
    """0-based places [N] among the items that a user is shown at one time: popular ones, with noise, come first."""
    rank = catalog.ranked.argsort(axis=1)[period_of(config, requests.time), item]
    key = np.log1p(rank - catalog.topic_start[catalog.topic[item]]) + PLACE_NOISE * rng.standard_normal(len(item))
    order = np.lexsort((key, requests.time, requests.user))
    first = np.flatnonzero((np.diff(requests.user, prepend=-1) != 0) | (np.diff(requests.time, prepend=-1) != 0))
    place = np.empty(len(item), np.int64)
    place[order] = np.arange(len(item)) - np.repeat(first, np.diff(np.append(first, len(item))))
    return place


@dataclass(frozen=True, slots=True)
class Queries:
    """Impressions with the range of packed events that is known about each user."""

    item: NDArray[np.int32]
    """[N] candidates."""
    time: Int
    """[N] ms"""
    start: Int
    """[N] packed index of the oldest known event."""
    stop: Int
    """[N] packed index after the newest event before the impression."""


@dataclass(frozen=True, slots=True)
class SimulatedChunk:
    """Events and impressions of consecutive users, packed in the order of users; items are rows of the catalog."""

    item: NDArray[np.int32]
    """[T]"""
    timestamp: Int
    """[T] ms"""
    action: NDArray[np.uint8]
    """[T] codes of `ACTIONS`."""
    impression_item: NDArray[np.int32]
    """[N]"""
    impression_timestamp: Int
    """[N] ms"""
    impression_position: Int
    """[N] number of the user's events strictly before the impression."""
    label: NDArray[np.int8]
    """[N, tasks] 0, 1, or -1 where unknown; the tasks are those of the world."""
    probability: NDArray[np.float32]
    """[N, tasks] true probability of label 1 if the user looks at the item; that of like and long_view is given a
    click."""
    decisive_age: Int
    """[N] number of the user's events since the newest event of the candidate's topic; -1 without such an event."""
    place: Int
    """[N] 0-based place in the list that was shown; 0 in worlds without lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedLog(SimulatedChunk):
    """All users' events and impressions, with what they were drawn from."""

    config: SimulateConfig
    catalog: Catalog
    offsets: Int
    """[num_users + 1] where each user's events start."""
    impression_user: Int
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


# What a mean of item vectors can tell: features of the candidate's vector and the means over several windows.
#
# Item vectors are the true ones: one-hot vectors of the item's latent class. The dot product of the candidate's vector
# with a mean is then the share of the candidate's class in a window. Features are these shares over several windows,
# their squares, and their square roots. A mean with decaying weights is close to a linear combination of means over
# windows.

POOLED_WINDOWS = (None, 2000, 500, 200, 100, 32, 8)
"""Numbers of newest events in the means; None for all."""


@dataclass(frozen=True, slots=True)
class PooledView:
    """One way to place items in latent classes."""

    event_class: NDArray[np.integer[Any]]
    """[num_items] class of an item in the history."""
    candidate_classes: tuple[NDArray[np.integer[Any]], ...]
    """[num_items] each: classes that a candidate is about. Its vector is the sum of their one-hot vectors."""


def pooled_features(log: SimulatedLog, views: tuple[PooledView, ...], chosen: NDArray[np.bool_]) -> Floats:
    """Features [chosen.sum(), F]: a constant, the candidate's quality, and its shares in each view and window."""
    columns = [np.ones(int(chosen.sum())), log.catalog.quality[log.impression_item[chosen]].astype(np.float64)]
    for view in views:
        index = TopicIndex(view.event_class[log.item])
        for window in POOLED_WINDOWS:
            asked = log.queries(chosen, window)
            shares = [
                index.count(wanted[asked.item], asked.start, asked.stop) / (asked.stop - asked.start)
                for wanted in view.candidate_classes
            ]
            total = np.sum(shares, axis=0)
            columns += [*shares, total**2, np.sqrt(total)]
    return np.stack(columns, axis=1)
