"""World `returns`: specific items come back after long gaps, and the candidate's own count and gap decide a click."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vista.config import SimulateConfig
from vista.simulation.catalog import Catalog, draw_items
from vista.simulation.event_stream import EventStream, draw_events, log_uniform, recurring_events
from vista.simulation.interests import draw_interests, draw_orders
from vista.simulation.queries import Queries
from vista.simulation.request_stream import RequestStream, draw_requests
from vista.simulation.topic_index import TopicIndex
from vista.simulation.worlds.click_world import ClickWorld

FAVORITES = (12, 20)
"""Minimum and maximum number of favorites per user; all are items of topic 0, which no other event has."""
PERIODS = (500.0, 2500.0)
"""Events between two occurrences of a favorite: log-uniform in this range, one period per user and favorite."""
JITTER = 0.2
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

    def draw(
        self, rng: np.random.Generator, config: SimulateConfig, catalog: Catalog, offsets: NDArray[np.int64]
    ) -> tuple[EventStream, RequestStream, NDArray[np.int32]]:
        """Put favorites into a history of interests. Candidates are favorites of any age, and popular items."""
        num_users, lengths = len(offsets) - 1, np.diff(offsets)
        interests = draw_interests(rng, config, offsets, *draw_orders(rng, config, num_users, reserved=1))
        events, _ = draw_events(rng, config, catalog, offsets, interests)
        first_topic = catalog.ranked[0, : catalog.topic_start[1]]
        favorite = first_topic[rng.random((num_users, len(first_topic))).argsort(axis=1)]
        number = np.minimum(rng.integers(FAVORITES[0], FAVORITES[1] + 1, num_users), len(first_topic))
        user, column = np.nonzero(np.arange(len(first_topic)) < number[:, None])
        period = log_uniform(rng, PERIODS, len(user))
        row, position = recurring_events(rng, period, lengths[user], JITTER)
        events.item[offsets[user[row]] + position] = favorite[user[row], column[row]]

        requests = draw_requests(rng, config, offsets, events.timestamp)
        user = requests.user
        slow = interests.order[user, (rng.random(len(user)) * interests.num_slow[user]).astype(np.int64)]
        popular = draw_items(rng, config, catalog, slow, requests.time)
        own = favorite[user, (rng.random(len(user)) * number[user]).astype(np.int64)]
        return events, requests, np.where(rng.random(len(user)) < SHARE_OF_FAVORITES, own, popular)

    def signals(
        self, catalog: Catalog, item: NDArray[np.int32], timestamp: NDArray[np.int64], asked: Queries
    ) -> NDArray[np.float64]:
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
