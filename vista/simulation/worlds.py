"""What the simulation needs from a world, which says how events come about and what decides a click."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeAlias

import numpy as np
from numpy.random import SFC64, Generator, SeedSequence
from numpy.typing import NDArray

from vista.arrays import Float32s, Floats, Int, offsets_of
from vista.config import SimulateConfig
from vista.config.checks import WorldName
from vista.log.histories import DAY_MS
from vista.logistic_regression import binned_features
from vista.simulation.streams import (
    OFF_TOPIC,
    Catalog,
    EventStream,
    IntArray,
    Interests,
    PooledView,
    Queries,
    RequestStream,
    SimulatedChunk,
    SimulatedLog,
    TopicIndex,
    draw_actions,
    draw_events,
    draw_interests,
    draw_items,
    draw_orders,
    draw_requests,
    draw_sessions,
    draw_times,
    log_uniform,
    other_topics,
    places_by_popularity,
    recurring_events,
    split_times,
)

Drawn: TypeAlias = tuple[EventStream, RequestStream, NDArray[np.int32]]
"""Events, requests, and the requests' candidates [N]."""


class World(ABC):
    """Draws events and impressions, and knows which features of a history decide the labels."""

    tasks: ClassVar[tuple[str, ...]] = ("click",)
    """Names of the labels; the first is click. The others are known of clicked impressions."""
    examination: ClassVar[tuple[float, ...]] = (1.0,)
    """Probability that a user looks at an item, by its 0-based place in a list; lower places have the last one. With
    several places, the items of a request are a list until the test part, and then each is at the top of its own."""

    @abstractmethod
    def draw(self, rng: Generator, config: SimulateConfig, catalog: Catalog, offsets: Int) -> Drawn:
        """Draw the events of users at `offsets` [U + 1], the requests, and their candidates [N]."""

    @abstractmethod
    def logits(self, catalog: Catalog, events: EventStream, asked: Queries) -> Floats:
        """Logits [N, tasks] of the labels of queries, from the known events."""

    def probabilities(self, catalog: Catalog, events: EventStream, asked: Queries) -> Float32s:
        """float32 [N, tasks] of the labels of queries, of items that the user looks at."""
        return (1 / (1 + np.exp(-self.logits(catalog, events, asked)))).astype(np.float32)

    @abstractmethod
    def window_features(self, log: SimulatedLog, window: int | None, chosen: NDArray[np.bool_]) -> Floats:
        """Regressors [chosen.sum(), F] of the chosen impressions, from the last `window` events (None: all events)."""

    def examined(self, place: Int) -> Floats:
        """Probability that a user looks at the items at 0-based places [N] of a list."""
        return np.asarray(self.examination)[np.minimum(place, len(self.examination) - 1)]

    def pooled_views(self, catalog: Catalog) -> tuple[PooledView, ...]:
        """The true classes of items, of which pooled vectors hold the shares: by default identities and topics."""
        identity = np.arange(len(catalog.topic))
        return PooledView(identity, (identity,)), PooledView(catalog.topic, (catalog.topic,))

    def make_chunk(self, config: SimulateConfig, catalog: Catalog, lengths: Int, seed: SeedSequence) -> SimulatedChunk:
        """Draw the events and impressions of users with `lengths` [U] events, each at least 1."""
        rng = Generator(SFC64(seed))
        offsets = offsets_of(lengths)
        events, requests, candidate = self.draw(rng, config, catalog, offsets)
        asked = Queries(candidate, requests.time, offsets[requests.user], requests.stop)
        probability = self.probabilities(catalog, events, asked)
        place = np.zeros(len(candidate), np.int64)
        if len(self.examination) > 1:
            place = places_by_popularity(rng, config, catalog, requests, candidate)
            place[requests.time >= split_times(config)[1]] = 0
        drawn_by = probability.copy()
        drawn_by[:, 0] *= self.examined(place)
        label = (rng.random(probability.shape, dtype=np.float32) < drawn_by).astype(np.int8)
        label[:, 1:][label[:, 0] == 0] = -1
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
            place=place,
        )


class ClickWorld(World):
    """A click has probability sigmoid(bias + weights · signals), where signals are computed from earlier events.

    A predictor with limited memory computes the same signals from the newest events alone, along with hints: what else
    these events tell about the signals of the whole history.
    """

    bias: ClassVar[float]
    weights: ClassVar[tuple[float, ...]]

    @abstractmethod
    def signals(self, catalog: Catalog, item: NDArray[np.int32], timestamp: Int, asked: Queries) -> Floats:
        """Signals and hints [N, R] of the queries, from the known events alone; signals are the first columns.

        Args:
            catalog: the items' topics.
            item: [T] packed events of all users.
            timestamp: [T] ms
            asked: candidates, times, and known events.
        """

    def logits(self, catalog: Catalog, events: EventStream, asked: Queries) -> Floats:
        """As `World.logits`: [N, 1]."""
        signals = self.signals(catalog, events.item, events.timestamp, asked)
        logit: Floats = self.bias + signals[:, : len(self.weights)] @ np.array(self.weights)
        return logit[:, None]

    def window_features(self, log: SimulatedLog, window: int | None, chosen: NDArray[np.bool_]) -> Floats:
        """As `World.window_features`."""
        return binned_features(self.signals(log.catalog, log.item, log.timestamp, log.queries(chosen, window)))


# World `conjunction`: a click needs two old interests together, the candidate's topic and its partner topic.

FULL_INTEREST = 100
"""Events of a topic that make a full interest."""
SHARE_OF_PAIRS = 0.9
"""Share of the candidates from pairs that the user visits; the others are of any other topic."""


class ConjunctionWorld(ClickWorld):
    """Topics 2j and 2j + 1 are partners. The signal is the weaker interest of the candidate's topic and its partner.

    A user visits a few pairs in two episodes each: either both topics once, or one of them twice. So neither the events
    of one topic nor their sum over a pair tells the two kinds apart.
    """

    bias, weights = -2.5, (4.5,)

    def draw(self, rng: Generator, config: SimulateConfig, catalog: Catalog, offsets: Int) -> Drawn:
        """Draw episodes about the topics of pairs. Most candidates are of either topic of a visited pair."""
        order, num_slow = _draw_pairs(rng, config, len(offsets) - 1)
        interests = draw_interests(rng, config, offsets, order, num_slow)
        events, _ = draw_events(rng, config, catalog, offsets, interests)

        requests = draw_requests(rng, config, offsets, events.timestamp)
        user = requests.user
        topic = _draw_topics_of_pairs(rng, order, num_slow, user)
        return events, requests, draw_items(rng, config, catalog, topic, requests.time)

    def signals(self, catalog: Catalog, item: NDArray[np.int32], timestamp: Int, asked: Queries) -> Floats:
        """[N, 4]: the weaker interest; hints: logs of the smaller count, the larger count, and the known events."""
        index = TopicIndex(catalog.topic[item])
        topic = catalog.topic[asked.item]
        counts = [index.count(wanted, asked.start, asked.stop) for wanted in (topic, partner(topic))]
        fewer, more = np.minimum(*counts), np.maximum(*counts)
        hints = [np.log1p(fewer), np.log1p(more), np.log1p(asked.stop - asked.start)]
        return np.stack([np.minimum(fewer / FULL_INTEREST, 1), *hints], axis=1)

    def pooled_views(self, catalog: Catalog) -> tuple[PooledView, ...]:
        """Events are compared by topic, and candidates ask for their topic and its partner."""
        return (PooledView(catalog.topic, (catalog.topic, partner(catalog.topic))),)


def _draw_pairs(
    rng: Generator, config: SimulateConfig, num_users: int, reserved: int = 0
) -> tuple[NDArray[np.uint8], Int]:
    """Draw each user's visited pairs, and the order of their episodes.

    Args:
        reserved: number of leading pairs that nobody visits.

    Returns:
        Topics uint8 [U, K - 2 reserved], those of the episodes first, and numbers of episodes int64 [U].
    """
    num_pairs = config.num_topics // 2 - reserved
    pair = rng.random((num_users, num_pairs)).argsort(axis=1) + reserved
    swap = rng.integers(0, 2, pair.shape)
    first, second = 2 * pair + swap, 2 * pair + 1 - swap
    num_slow = 2 * rng.integers(config.min_interests, config.max_interests + 1, num_users)
    column = np.arange(2 * num_pairs)
    visited = column < num_slow[:, None]
    order = np.stack([first, second], axis=2).reshape(num_users, -1)
    twice = np.repeat(rng.random(pair.shape) < 0.5, 2, axis=1)
    order = np.where(visited & twice, np.repeat(first, 2, axis=1), order)
    turns = np.where(visited, rng.random(order.shape), 1 + column).argsort(axis=1)
    return np.take_along_axis(order, turns, axis=1).astype(np.uint8), num_slow


def _draw_topics_of_pairs(rng: Generator, order: NDArray[np.uint8], num_slow: Int, user: Int) -> NDArray[np.uint8]:
    """Topics uint8 [N] of candidates: of either topic of a visited pair, or outside of them."""
    own = order[user, (rng.random(len(user)) * num_slow[user]).astype(np.int64)] ^ rng.integers(
        0, 2, len(user), dtype=np.uint8
    )
    other = other_topics(rng, order, num_slow[user], user, (len(user),))
    return np.where(rng.random(len(user)) < SHARE_OF_PAIRS, own, other)


def partner(topic: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The other topic of each topic's pair."""
    return topic ^ np.uint8(1)


# World `drift`: old tastes reverse. Each reversal turns what the user liked into what the user dislikes.

REVERSAL_EVENTS = 1100.0
"""Mean number of events between two reversals. A reversal is an event of topic 0, which no other event has."""
DRIFT_JITTER = 0.3
"""Standard deviation of the number of events between two reversals, as a share of its mean."""
TASTE_PRIOR = 20
"""Events added to a topic's count before its taste is computed."""
SHARE_OF_INTERESTS = 0.9
"""Share of the candidates that are of one of the user's slow interests; the others are of any other topic."""


class DriftWorld(ClickWorld):
    """The signal is the user's taste for the candidate's topic.

    It is the share of the topic's events that an even number of reversals followed, less the share of the others.
    """

    bias, weights = -0.5, (4.0,)

    def draw(self, rng: Generator, config: SimulateConfig, catalog: Catalog, offsets: Int) -> Drawn:
        """Put reversals into a history of interests. Candidates are of any slow interest, or of another topic."""
        num_users, lengths = len(offsets) - 1, np.diff(offsets)
        interests = draw_interests(rng, config, offsets, *draw_orders(rng, config, num_users, reserved=1))
        events, _ = draw_events(rng, config, catalog, offsets, interests)
        user, position = recurring_events(rng, np.full(num_users, REVERSAL_EVENTS), lengths, DRIFT_JITTER)
        events.item[offsets[user] + position] = catalog.ranked[0, rng.integers(0, catalog.topic_start[1], len(user))]

        requests = draw_requests(rng, config, offsets, events.timestamp)
        user = requests.user
        slow = interests.order[user, (rng.random(len(user)) * interests.num_slow[user]).astype(np.int64)]
        other = other_topics(rng, interests.order, interests.num_slow[user], user, (len(user),))
        topic = np.where(rng.random(len(user)) < SHARE_OF_INTERESTS, slow, other)
        return events, requests, draw_items(rng, config, catalog, topic, requests.time)

    def signals(self, catalog: Catalog, item: NDArray[np.int32], timestamp: Int, asked: Queries) -> Floats:
        """[N, 5]: taste; hints: log counts of liked and disliked events, log age, log of known events."""
        topic = catalog.topic[item].astype(np.int64)
        odd = np.cumsum(topic == 0) % 2
        index = TopicIndex(2 * topic + odd)
        wanted = 2 * catalog.topic[asked.item].astype(np.int64)
        now = odd[asked.stop - 1]
        like = index.count(wanted + now, asked.start, asked.stop)
        dislike = index.count(wanted + 1 - now, asked.start, asked.stop)
        taste = (like - dislike) / (like + dislike + TASTE_PRIOR)
        age = TopicIndex(topic).age(catalog.topic[asked.item], asked.start, asked.stop)
        hints = [np.log1p(like), np.log1p(dislike), np.log1p(1 + age), np.log1p(asked.stop - asked.start)]
        return np.stack([taste, *hints], axis=1)


# World `returns`: specific items come back after long gaps, and the candidate's own count and gap decide a click.

FAVORITES = (12, 20)
"""Minimum and maximum number of favorites per user; all are items of topic 0, which no other event has."""
RETURNS_PERIODS = (500.0, 2500.0)
"""Events between two occurrences of a favorite: log-uniform in this range, one period per user and favorite."""
RETURNS_JITTER = 0.2
"""Standard deviation of a gap, as a share of the favorite's period."""
FULL_COUNT = 8
"""Count at which the count's signal is 1."""
DUE_WIDTH = 0.18
"""Twice the variance of the bell over the logarithm of gap divided by period, within which an item is due."""
SHARE_OF_FAVORITES = 0.75
"""Share of the candidates that are the user's favorites; the others follow popularity within a slow interest."""


class ReturnsWorld(ClickWorld):
    """The signals are the candidate's count on a log scale, and whether its gap equals its mean gap so far."""

    bias, weights = -3.0, (1.5, 3.5)

    def draw(self, rng: Generator, config: SimulateConfig, catalog: Catalog, offsets: Int) -> Drawn:
        """Put favorites into a history of interests. Candidates are favorites of any age, and popular items."""
        interests = draw_interests(rng, config, offsets, *draw_orders(rng, config, len(offsets) - 1, reserved=1))
        events, _ = draw_events(rng, config, catalog, offsets, interests)
        favorite, number = _put_favorites(rng, catalog, offsets, events.item, RETURNS_PERIODS)

        requests = draw_requests(rng, config, offsets, events.timestamp)
        user = requests.user
        slow = interests.order[user, (rng.random(len(user)) * interests.num_slow[user]).astype(np.int64)]
        popular = draw_items(rng, config, catalog, slow, requests.time)
        own = favorite[user, (rng.random(len(user)) * number[user]).astype(np.int64)]
        return events, requests, np.where(rng.random(len(user)) < SHARE_OF_FAVORITES, own, popular)

    def signals(self, catalog: Catalog, item: NDArray[np.int32], timestamp: Int, asked: Queries) -> Floats:
        """[N, 6]: count and due; hints: log gap, log period, log of known events, can be a favorite."""
        index = TopicIndex(item)
        count = index.count(asked.item, asked.start, asked.stop)
        gap = 1 + index.age(asked.item, asked.start, asked.stop)  # 0 if absent
        newest = asked.stop - gap
        oldest = index.first(asked.item, asked.start, asked.stop)
        period = np.where(count > 1, (newest - oldest) / np.maximum(count - 1, 1), 0)
        known = period > 0
        ratio = np.log(np.where(known, gap, 1) / np.where(known, period, 1))
        due = np.where(known, np.exp(-(ratio**2) / DUE_WIDTH), 0)
        hints = [np.log1p(gap), np.log1p(period), np.log1p(asked.stop - asked.start), catalog.topic[asked.item] == 0]
        return np.stack([np.log1p(count) / np.log1p(FULL_COUNT), due, *hints], axis=1)


def _put_favorites(
    rng: Generator, catalog: Catalog, offsets: Int, item: NDArray[np.int32], periods: tuple[float, float]
) -> tuple[NDArray[np.int32], Int]:
    """Replace some of the items [T] by the users' favorites, each of which recurs with a period of its own.

    Returns:
        Favorites int32 [U, items of topic 0], the user's own first, and numbers of favorites int64 [U].
    """
    num_users, lengths = len(offsets) - 1, np.diff(offsets)
    first_topic = catalog.ranked[0, : catalog.topic_start[1]]
    favorite = first_topic[rng.random((num_users, len(first_topic))).argsort(axis=1)]
    number = np.minimum(rng.integers(FAVORITES[0], FAVORITES[1] + 1, num_users), len(first_topic))
    user, column = np.nonzero(np.arange(len(first_topic)) < number[:, None])
    period = log_uniform(rng, periods, len(user))
    row, position = recurring_events(rng, period, lengths[user], RETURNS_JITTER)
    item[offsets[user[row]] + position] = favorite[user[row], column[row]]
    return favorite, number


# World `mixed`: items that come back, and two old interests at once. It is the world of `make demo`.

MIXED_PERIODS = (40.0, 200.0)
"""As RETURNS_PERIODS. Favorites that return so soon are among a user's 64 most frequent items."""
RECENCY_EVENTS = 50.0
"""Events after which the signal of recency has fallen to 1/e."""


class MixedWorld(ClickWorld):
    """Half of the candidates are favorites: the signals are how often and how recently the user had the item.

    The others have the signal of `conjunction`.
    """

    bias, weights = -2.5, (1.0, 3.5, 4.5, -1.0)

    def draw(self, rng: Generator, config: SimulateConfig, catalog: Catalog, offsets: Int) -> Drawn:
        """Put favorites into a history of episodes about the topics of pairs."""
        order, num_slow = _draw_pairs(rng, config, len(offsets) - 1, reserved=1)
        events, _ = draw_events(rng, config, catalog, offsets, draw_interests(rng, config, offsets, order, num_slow))
        favorite, number = _put_favorites(rng, catalog, offsets, events.item, MIXED_PERIODS)

        requests = draw_requests(rng, config, offsets, events.timestamp)
        user = requests.user
        topic = _draw_topics_of_pairs(rng, order, num_slow, user)
        other = draw_items(rng, config, catalog, topic, requests.time)
        own = favorite[user, (rng.random(len(user)) * number[user]).astype(np.int64)]
        return events, requests, np.where(rng.random(len(user)) < 0.5, own, other)

    def signals(self, catalog: Catalog, item: NDArray[np.int32], timestamp: Int, asked: Queries) -> Floats:
        """[N, 9]: count and recency of a favorite, the weaker interest of another item, is a favorite; and hints."""
        index = TopicIndex(item)
        count = np.log1p(index.count(asked.item, asked.start, asked.stop)) / np.log1p(FULL_COUNT)
        age = index.age(asked.item, asked.start, asked.stop)
        recency = np.where(age >= 0, np.exp(-age / RECENCY_EVENTS), 0)
        pairs = ConjunctionWorld().signals(catalog, item, timestamp, asked)
        is_favorite = catalog.topic[asked.item] == 0
        signals = [count * is_favorite, recency * is_favorite, pairs[:, 0] * ~is_favorite, is_favorite]
        return np.column_stack([*signals, count, recency, pairs[:, 1:]])

    def pooled_views(self, catalog: Catalog) -> tuple[PooledView, ...]:
        """The views of both worlds."""
        identity = np.arange(len(catalog.topic))
        topics = (catalog.topic, partner(catalog.topic))
        return PooledView(identity, (identity,)), PooledView(catalog.topic, topics)


# World `seasons`: what the user did at this time of earlier years, and on this weekday, decides a click.

YEAR_MS = 365 * DAY_MS
NUM_SEASONS = 13
"""Seasons of a year, each with a topic per user."""
SEASON_MS = 28 * DAY_MS
"""Length of a season, and of the time of earlier years that counts: from the request's time of the year on."""
SEASON_SHARE, WEEKDAY_SHARE = 0.6, 0.2
"""Shares of sessions about the season's topic and about the weekday's topic; the others are about any topic."""
FULL_SEASON, FULL_WEEKDAY = 0.4, 0.1
"""Shares of events at which the signals are 1."""
PRIOR = 5
"""Events added to the number of events before a share is computed."""


class SeasonsWorld(ClickWorld):
    """The signals are shares of the candidate's topic among two sets of earlier events.

    One set is the four weeks that followed this time in earlier years. The other is all events on this weekday.
    """

    bias, weights = -3.0, (4.5, 1.0)

    def draw(self, rng: Generator, config: SimulateConfig, catalog: Catalog, offsets: Int) -> Drawn:
        """Draw sessions by the calendar. Candidates are of the next season, of any season, or of any topic."""
        order, _ = draw_orders(rng, config, len(offsets) - 1)
        start, of_event = draw_sessions(rng, config, offsets)
        timestamp = draw_times(rng, config, offsets, start, of_event)
        user = np.searchsorted(offsets, start, side="right") - 1
        kind = rng.random(len(start))
        any_topic = rng.integers(0, config.num_topics, len(start)).astype(np.uint8)
        seasonal = np.where(kind < SEASON_SHARE, _season_topic(order, user, timestamp[start]), any_topic)
        weekly = (kind >= SEASON_SHARE) & (kind < SEASON_SHARE + WEEKDAY_SHARE)
        topic = np.where(weekly, _weekday_topic(order, user, timestamp[start]), seasonal)[of_event]
        off_topic = rng.random(len(topic), dtype=np.float32) < OFF_TOPIC
        topic[off_topic] = rng.integers(0, config.num_topics, int(off_topic.sum()))
        item = draw_items(rng, config, catalog, topic, timestamp[start], of_event)
        events = EventStream(item, timestamp, draw_actions(rng, ~off_topic))

        requests = draw_requests(rng, config, offsets, timestamp)
        user, time = requests.user, requests.time
        kind = rng.random(len(user))
        soon = _season_topic(order, user, time + SEASON_MS)
        other = _season_topic(order, user, time + rng.integers(0, YEAR_MS, len(user)))
        any_topic = rng.integers(0, config.num_topics, len(user)).astype(np.uint8)
        wanted = np.where(kind < 0.4, soon, np.where(kind < 0.8, other, any_topic))
        return events, requests, draw_items(rng, config, catalog, wanted, time)

    def signals(self, catalog: Catalog, item: NDArray[np.int32], timestamp: Int, asked: Queries) -> Floats:
        """[N, 6]: season, weekday; hints: logs of the season's events, age, count, and known events."""
        topic, wanted = catalog.topic[item].astype(np.int64), catalog.topic[asked.item].astype(np.int64)
        index = TopicIndex(topic)
        matching, total = np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.int64)
        span = np.ptp(timestamp)
        for years in range(1, int(span // YEAR_MS) + 2):
            low = _first_not_before(timestamp, asked, asked.time - years * YEAR_MS)
            high = _first_not_before(timestamp, asked, asked.time - years * YEAR_MS + SEASON_MS)
            matching += index.count(wanted, low, high)
            total += high - low
        day, today = weekday(timestamp), weekday(asked.time)
        same_day = TopicIndex(7 * topic + day).count(7 * wanted + today, asked.start, asked.stop)
        days = TopicIndex(day).count(today, asked.start, asked.stop)
        season = np.minimum(matching / (total + PRIOR) / FULL_SEASON, 1)
        weekly = np.minimum(same_day / (days + PRIOR) / FULL_WEEKDAY, 1)
        age = index.age(wanted, asked.start, asked.stop)
        count = index.count(wanted, asked.start, asked.stop)
        hints = [np.log1p(total), np.log1p(1 + age), np.log1p(count), np.log1p(asked.stop - asked.start)]
        return np.stack([season, weekly, *hints], axis=1)


def weekday(time: Int) -> Int:
    """Day of the week (UTC), 0 for Thursday, which 1970 began with."""
    return time // DAY_MS % 7


def _season_topic(order: NDArray[np.uint8], user: Int, time: Int) -> NDArray[np.uint8]:
    season = time % YEAR_MS * NUM_SEASONS // YEAR_MS
    return np.asarray(order[user, season % order.shape[1]])


def _weekday_topic(order: NDArray[np.uint8], user: Int, time: Int) -> NDArray[np.uint8]:
    return np.asarray(order[user, (NUM_SEASONS + weekday(time)) % order.shape[1]])


def _first_not_before(timestamp: Int, asked: Queries, time: Int) -> Int:
    """Packed index [N] of the first known event at or after `time` [N], by bisection; `stop` if there is none."""
    low, high = asked.start.copy(), asked.stop.copy()
    while (low < high).any():
        middle = (low + high) // 2
        later = (low < high) & (timestamp[np.minimum(middle, len(timestamp) - 1)] < time)
        low, high = np.where(later, middle + 1, low), np.where(later, high, np.minimum(middle, high))
    return low


# World `sequence`: what followed the newest event's item the last time in the user's own history decides a click.

MOST_CUES = 40
"""Maximum number of cues per user; all are items of topic 0, which no other event has."""
SEQUENCE_PERIODS = (1650.0, 3500.0)
"""Events between two occurrences of a cue: log-uniform in this range, one period per user and cue."""
JITTER = 0.3
"""Standard deviation of a gap, as a share of the cue's period."""
NUM_SUCCESSORS = 10
"""Number of items per user that follow cues. Several cues share one, so none can be ruled out by what it follows."""
CHANGE_RATE = 0.2
"""Probability that a cue has a new successor from one occurrence to the next."""
NEIGHBORS = 5
"""Wrong candidates followed one of so many cue events before or after the right one, so that they are equally old."""


class SequenceWorld(ClickWorld):
    """The signal is whether the candidate followed the item of the newest event when that item occurred before."""

    bias, weights = -2.5, (4.5,)

    def draw(self, rng: Generator, config: SimulateConfig, catalog: Catalog, offsets: Int) -> Drawn:
        """Put cues with their successors into a history of interests.

        Requests come directly after a cue that occurred before. Half of the candidates are what followed it then; the
        others followed another cue at about that time.
        """
        interests = draw_interests(rng, config, offsets, *draw_orders(rng, config, len(offsets) - 1, reserved=1))
        events, _ = draw_events(rng, config, catalog, offsets, interests)
        item = events.item
        _put_cues(rng, catalog, offsets, item)

        index = TopicIndex(item)
        cue = np.flatnonzero(catalog.topic[item] == 0)
        first = offsets[np.searchsorted(offsets, cue, side="right") - 1]
        again = np.zeros(len(item), bool)
        again[cue] = index.age(item[cue], first, cue) >= 0
        requests = draw_requests(rng, config, offsets, events.timestamp, again)
        newest, first = requests.stop - 1, offsets[requests.user]
        before = index.age(item[newest], first, newest)
        follower = item[np.where(before >= 0, newest - before, newest)]
        wrong = np.flatnonzero((before >= 0) & (rng.random(len(newest)) < 0.5))
        newest, first, before = newest[wrong], first[wrong], before[wrong]
        step = rng.integers(1, NEIGHBORS + 1, len(wrong)) * rng.choice((-1, 1), len(wrong))
        near = np.searchsorted(cue, newest - 1 - before) + step
        near = np.clip(near, np.searchsorted(cue, first), np.searchsorted(cue, newest) - 1)
        candidate = follower.copy()
        candidate[wrong] = item[cue[near] + 1]
        return events, requests, candidate

    def signals(self, catalog: Catalog, item: NDArray[np.int32], timestamp: Int, asked: Queries) -> Floats:
        """[N, 5]: follows; hints: cue known, last followed another cue, log count, log of known events."""
        index = TopicIndex(item)
        newest = asked.stop - 1
        before = index.age(item[newest], asked.start, newest)
        known = before >= 0
        follows = known & (item[np.where(known, newest - before, newest)] == asked.item)
        age = index.age(asked.item, asked.start, asked.stop)
        previous = np.maximum(asked.stop - 2 - age, asked.start)  # the event before the candidate's newest
        elsewhere = (age >= 0) & (catalog.topic[item[previous]] == 0) & (item[previous] != item[newest])
        count = index.count(asked.item, asked.start, asked.stop)
        return np.stack([follows, known, elsewhere, np.log1p(count), np.log1p(asked.stop - asked.start)], axis=1)


def _put_cues(rng: Generator, catalog: Catalog, offsets: Int, item: NDArray[np.int32]) -> None:
    """Replace some of the items [T] by cues, and the items after them by the cues' successors."""
    num_users, lengths = len(offsets) - 1, np.diff(offsets)
    cues = catalog.ranked[0, : catalog.topic_start[1]][:MOST_CUES]
    user = np.repeat(np.arange(num_users), len(cues))
    row, position = recurring_events(rng, log_uniform(rng, SEQUENCE_PERIODS, len(user)), lengths[user], JITTER)
    place, room = offsets[user[row]] + position, position + 1 < lengths[user[row]]
    version = np.cumsum((np.diff(row, prepend=-1) > 0) | (rng.random(len(row)) < CHANGE_RATE)) - 1
    others = catalog.ranked[0, catalog.topic_start[1] :]
    pool = others[rng.integers(0, len(others), (num_users, NUM_SUCCESSORS))]
    successor = pool[user[row], rng.integers(0, NUM_SUCCESSORS, len(row))[version]]
    item[place[room] + 1] = successor[room]
    item[place] = cues[row % len(cues)]


# World `share`: a click depends on how much of the user's whole history is about the candidate's topic.
#
# A few slow interests take turns, so those that are dormant do not occur among the newest events.
# docs/design/simulation.md has the formula and the reference figures.

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
"""[3, 4] coefficients of the label logits."""
_NESTED = (8, 16, RECENT_EVENTS, 64, 128)
"""Shorter windows whose counts a predictor uses along with its own."""


def affinity(count: IntArray, num_events: IntArray) -> Floats:
    """Long-term affinity: a log-scaled share of the history, 0 without events of the topic, 1 at AFFINITY_FULL.

    Args:
        count: [N] events of the topic so far.
        num_events: [N] events so far.
    """
    share = count / (num_events + AFFINITY_PRIOR)
    return np.asarray(np.log1p(share / AFFINITY_UNIT) / np.log1p(AFFINITY_FULL / AFFINITY_UNIT))


def recent_match(count: IntArray) -> Floats:
    """Recent match in [0, 1] from the number [N] of a topic's events among the last RECENT_EVENTS."""
    return np.asarray(np.log1p(count) / np.log1p(RECENT_EVENTS))


class ShareWorld(World):
    """A click depends on the share of the candidate's topic in the whole history."""

    tasks: ClassVar[tuple[str, ...]] = ("click", "like", "long_view")

    def draw(self, rng: Generator, config: SimulateConfig, catalog: Catalog, offsets: Int) -> Drawn:
        """Draw a history of interests. Candidates are of dormant, current, and passing topics."""
        interests = draw_interests(rng, config, offsets, *draw_orders(rng, config, len(offsets) - 1))
        events, episode = draw_events(rng, config, catalog, offsets, interests)
        requests = draw_requests(rng, config, offsets, events.timestamp)
        topic = _draw_candidates(rng, interests, requests.user, episode[requests.stop - 1])
        return events, requests, draw_items(rng, config, catalog, topic, requests.time)

    def logits(self, catalog: Catalog, events: EventStream, asked: Queries) -> Floats:
        """As `World.logits`."""
        index, topic = TopicIndex(catalog.topic[events.item]), catalog.topic[asked.item]
        start, stop = asked.start, asked.stop
        long_term = affinity(index.count(topic, start, stop), stop - start)
        recent = recent_match(index.count(topic, np.maximum(start, stop - RECENT_EVENTS), stop))
        features = np.stack([np.ones(len(topic)), long_term, recent, catalog.quality[asked.item]], axis=1)
        return np.asarray(features @ LOGITS.T)

    def window_features(self, log: SimulatedLog, window: int | None, chosen: NDArray[np.bool_]) -> Floats:
        """Regressors [chosen.sum(), F] of the chosen impressions, from the last `window` events (None: all events)."""
        index = TopicIndex(log.catalog.topic[log.item])
        asked = log.queries(chosen, window)
        topic, seen = log.catalog.topic[asked.item], asked.stop - asked.start
        sizes = [size for size in _NESTED if window is None or size < window]
        starts = [*(np.maximum(asked.start, asked.stop - size) for size in sizes), asked.start]
        counts = [index.count(topic, start, asked.stop) for start in starts]

        share = affinity(counts[-1], seen)
        recent = np.log1p(counts[min(2, len(counts) - 1)])
        smooth = [share, share**2, recent, recent**2, share * recent, np.log1p(seen), np.log1p(seen) * share]
        bins = [np.minimum((2 * np.log2(count + 1)).astype(np.int64), 15) for count in counts]
        cells = [np.eye(16)[code] for code in bins] + [_joint(bins[-1] // 2, bins[min(2, len(counts) - 1)] // 2)]
        quality = log.catalog.quality[asked.item].astype(np.float64)
        mixed = [quality, quality * share, quality * recent]
        constant = np.ones(len(topic))
        return np.concatenate([np.stack([constant, *smooth, *mixed], axis=1), *cells], axis=1)

    def pooled_views(self, catalog: Catalog) -> tuple[PooledView, ...]:
        """Items are compared by topic."""
        return (PooledView(catalog.topic, (catalog.topic,)),)


def _draw_candidates(rng: Generator, interests: Interests, user: Int, episode: Int) -> NDArray[np.uint8]:
    """Topics [N]: a third dormant slow interests, a third current ones, a third without lasting interest."""
    slow, ordinal = interests.num_slow[user], interests.episode_ordinal[episode]
    kind = rng.integers(0, 3, len(user))
    passing = interests.active[episode, 2 + rng.integers(0, 2, len(user))]
    other = other_topics(rng, interests.order, slow, user, (len(user),))
    topic = np.where(rng.random(len(user)) < 0.3, passing, other)
    current = interests.active[episode, (rng.random(len(user)) < 0.3).astype(np.int64)]
    topic = np.where(kind == 1, current, topic)
    num_dormant = np.minimum(ordinal + 1, slow) - 2
    back = 2 + (rng.random(len(user)) * np.maximum(num_dormant, 1)).astype(np.int64)
    dormant = interests.order[user, (ordinal - back) % slow]
    return np.asarray(np.where((kind == 0) & (num_dormant > 0), dormant, topic))


def _joint(left: Int, right: Int) -> Floats:
    """One-hot cells [N, 64] of pairs of codes in 0..7."""
    return np.asarray(np.eye(64)[left * 8 + right])


# World `positions`: what is shown at the top gets more clicks, whether or not users want it.


class PositionsWorld(ShareWorld):
    """World `share`, except that users look at lower places less often, and that popular items are at the top.

    So labels have a position bias, except those of the test part.
    """

    tasks = ("click",)
    examination = (1.0, 0.5, 0.3, 0.2)

    def logits(self, catalog: Catalog, events: EventStream, asked: Queries) -> Floats:
        """As `World.logits`: [N, 1]."""
        return super().logits(catalog, events, asked)[:, :1]


WORLDS: dict[WorldName, World] = {
    WorldName.share: ShareWorld(),
    WorldName.mixed: MixedWorld(),
    WorldName.returns: ReturnsWorld(),
    WorldName.sequence: SequenceWorld(),
    WorldName.conjunction: ConjunctionWorld(),
    WorldName.seasons: SeasonsWorld(),
    WorldName.drift: DriftWorld(),
    WorldName.positions: PositionsWorld(),
}
