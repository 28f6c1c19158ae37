"""World `drift`: old tastes reverse. Each reversal turns what the user liked into what the user dislikes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vista.config import SimulateConfig
from vista.simulation.catalog import Catalog, draw_items
from vista.simulation.event_stream import EventStream, draw_events, recurring_events
from vista.simulation.interests import draw_interests, draw_orders, other_topics
from vista.simulation.queries import Queries
from vista.simulation.request_stream import RequestStream, draw_requests
from vista.simulation.topic_index import TopicIndex
from vista.simulation.worlds.click_world import ClickWorld

REVERSAL_EVENTS = 1100.0
"""Mean number of events between two reversals. A reversal is an event of topic 0, which no other event has."""
JITTER = 0.3
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

    def draw(
        self, rng: np.random.Generator, config: SimulateConfig, catalog: Catalog, offsets: NDArray[np.int64]
    ) -> tuple[EventStream, RequestStream, NDArray[np.int32]]:
        """Put reversals into a history of interests. Candidates are of any slow interest, or of another topic."""
        num_users, lengths = len(offsets) - 1, np.diff(offsets)
        interests = draw_interests(rng, config, offsets, *draw_orders(rng, config, num_users, reserved=1))
        events, _ = draw_events(rng, config, catalog, offsets, interests)
        user, position = recurring_events(rng, np.full(num_users, REVERSAL_EVENTS), lengths, JITTER)
        events.item[offsets[user] + position] = catalog.ranked[0, rng.integers(0, catalog.topic_start[1], len(user))]

        requests = draw_requests(rng, config, offsets, events.timestamp)
        user = requests.user
        slow = interests.order[user, (rng.random(len(user)) * interests.num_slow[user]).astype(np.int64)]
        other = other_topics(rng, interests.order, interests.num_slow[user], user, (len(user),))
        topic = np.where(rng.random(len(user)) < SHARE_OF_INTERESTS, slow, other)
        return events, requests, draw_items(rng, config, catalog, topic, requests.time)

    def signals(
        self, catalog: Catalog, item: NDArray[np.int32], timestamp: NDArray[np.int64], asked: Queries
    ) -> NDArray[np.float64]:
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
