"""World `seasons`: what the user did at this time of earlier years, and on this weekday, decides a click."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vista.config import SimulateConfig
from vista.log.histories import DAY_MS
from vista.simulation.catalog import Catalog, draw_items
from vista.simulation.event_stream import OFF_TOPIC, EventStream, draw_actions, draw_sessions, draw_times
from vista.simulation.interests import draw_orders
from vista.simulation.queries import Queries
from vista.simulation.request_stream import RequestStream, draw_requests
from vista.simulation.topic_index import TopicIndex
from vista.simulation.worlds.click_world import ClickWorld

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

    def draw(
        self, rng: np.random.Generator, config: SimulateConfig, catalog: Catalog, offsets: NDArray[np.int64]
    ) -> tuple[EventStream, RequestStream, NDArray[np.int32]]:
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

    def signals(
        self, catalog: Catalog, item: NDArray[np.int32], timestamp: NDArray[np.int64], asked: Queries
    ) -> NDArray[np.float64]:
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


def weekday(time: NDArray[np.int64]) -> NDArray[np.int64]:
    """Day of the week (UTC), 0 for Thursday, which 1970 began with."""
    return time // DAY_MS % 7


def _season_topic(order: NDArray[np.uint8], user: NDArray[np.int64], time: NDArray[np.int64]) -> NDArray[np.uint8]:
    season = time % YEAR_MS * NUM_SEASONS // YEAR_MS
    return np.asarray(order[user, season % order.shape[1]])


def _weekday_topic(order: NDArray[np.uint8], user: NDArray[np.int64], time: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.asarray(order[user, (NUM_SEASONS + weekday(time)) % order.shape[1]])


def _first_not_before(timestamp: NDArray[np.int64], asked: Queries, time: NDArray[np.int64]) -> NDArray[np.int64]:
    """Packed index [N] of the first known event at or after `time` [N], by bisection; `stop` if there is none."""
    low, high = asked.start.copy(), asked.stop.copy()
    while (low < high).any():
        middle = (low + high) // 2
        later = (low < high) & (timestamp[np.minimum(middle, len(timestamp) - 1)] < time)
        low, high = np.where(later, middle + 1, low), np.where(later, high, np.minimum(middle, high))
    return low
