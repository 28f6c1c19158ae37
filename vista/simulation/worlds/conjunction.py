"""World `conjunction`: a click needs two old interests together, the candidate's topic and its partner topic."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vista.config import SimulateConfig
from vista.simulation.catalog import Catalog, draw_items
from vista.simulation.event_stream import EventStream, draw_events
from vista.simulation.interests import draw_interests, other_topics
from vista.simulation.pooled_vectors import PooledView
from vista.simulation.queries import Queries
from vista.simulation.request_stream import RequestStream, draw_requests
from vista.simulation.topic_index import TopicIndex
from vista.simulation.worlds.click_world import ClickWorld

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

    def draw(
        self, rng: np.random.Generator, config: SimulateConfig, catalog: Catalog, offsets: NDArray[np.int64]
    ) -> tuple[EventStream, RequestStream, NDArray[np.int32]]:
        """Draw episodes about the topics of pairs. Most candidates are of either topic of a visited pair."""
        num_users, num_pairs = len(offsets) - 1, config.num_topics // 2
        pair = rng.random((num_users, num_pairs)).argsort(axis=1)
        swap = rng.integers(0, 2, pair.shape)
        first, second = 2 * pair + swap, 2 * pair + 1 - swap
        num_slow = 2 * rng.integers(config.min_interests, config.max_interests + 1, num_users)
        column = np.arange(2 * num_pairs)
        visited = column < num_slow[:, None]
        order = np.stack([first, second], axis=2).reshape(num_users, -1)
        twice = np.repeat(rng.random(pair.shape) < 0.5, 2, axis=1)
        order = np.where(visited & twice, np.repeat(first, 2, axis=1), order)
        turns = np.where(visited, rng.random(order.shape), 1 + column).argsort(axis=1)
        order = np.take_along_axis(order, turns, axis=1).astype(np.uint8)
        interests = draw_interests(rng, config, offsets, order, num_slow)
        events, _ = draw_events(rng, config, catalog, offsets, interests)

        requests = draw_requests(rng, config, offsets, events.timestamp)
        user = requests.user
        own = order[user, (rng.random(len(user)) * num_slow[user]).astype(np.int64)] ^ rng.integers(
            0, 2, len(user), dtype=np.uint8
        )
        other = other_topics(rng, order, num_slow[user], user, (len(user),))
        topic = np.where(rng.random(len(user)) < SHARE_OF_PAIRS, own, other)
        return events, requests, draw_items(rng, config, catalog, topic, requests.time)

    def signals(
        self, catalog: Catalog, item: NDArray[np.int32], timestamp: NDArray[np.int64], asked: Queries
    ) -> NDArray[np.float64]:
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


def partner(topic: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The other topic of each topic's pair."""
    return topic ^ np.uint8(1)
