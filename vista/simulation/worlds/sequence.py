"""World `sequence`: what followed the newest event's item the last time in the user's own history decides a click."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vista.config import SimulateConfig
from vista.simulation.catalog import Catalog
from vista.simulation.event_stream import EventStream, draw_events, log_uniform, recurring_events
from vista.simulation.interests import draw_interests, draw_orders
from vista.simulation.queries import Queries
from vista.simulation.request_stream import RequestStream, draw_requests
from vista.simulation.topic_index import TopicIndex
from vista.simulation.worlds.click_world import ClickWorld

MOST_CUES = 40
"""Maximum number of cues per user; all are items of topic 0, which no other event has."""
PERIODS = (1650.0, 3500.0)
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

    def draw(
        self, rng: np.random.Generator, config: SimulateConfig, catalog: Catalog, offsets: NDArray[np.int64]
    ) -> tuple[EventStream, RequestStream, NDArray[np.int32]]:
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

    def signals(
        self, catalog: Catalog, item: NDArray[np.int32], timestamp: NDArray[np.int64], asked: Queries
    ) -> NDArray[np.float64]:
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


def _put_cues(rng: np.random.Generator, catalog: Catalog, offsets: NDArray[np.int64], item: NDArray[np.int32]) -> None:
    """Replace some of the items [T] by cues, and the items after them by the cues' successors."""
    num_users, lengths = len(offsets) - 1, np.diff(offsets)
    cues = catalog.ranked[0, : catalog.topic_start[1]][:MOST_CUES]
    user = np.repeat(np.arange(num_users), len(cues))
    row, position = recurring_events(rng, log_uniform(rng, PERIODS, len(user)), lengths[user], JITTER)
    place, room = offsets[user[row]] + position, position + 1 < lengths[user[row]]
    version = np.cumsum((np.diff(row, prepend=-1) > 0) | (rng.random(len(row)) < CHANGE_RATE)) - 1
    others = catalog.ranked[0, catalog.topic_start[1] :]
    pool = others[rng.integers(0, len(others), (num_users, NUM_SUCCESSORS))]
    successor = pool[user[row], rng.integers(0, NUM_SUCCESSORS, len(row))[version]]
    item[place[room] + 1] = successor[room]
    item[place] = cues[row % len(cues)]
