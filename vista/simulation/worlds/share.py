"""World `share`: a click depends on how much of the user's whole history is about the candidate's topic.

A few slow interests take turns, so those that are dormant do not occur among the newest events.
docs/explanation/simulation.md has the formula and the reference figures.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vista.arrays import offsets_of
from vista.config import SimulateConfig
from vista.simulation.catalog import Catalog, draw_items
from vista.simulation.event_stream import draw_events
from vista.simulation.interests import Interests, draw_interests, draw_orders, other_topics
from vista.simulation.pooled_vectors import PooledView
from vista.simulation.request_stream import draw_requests
from vista.simulation.simulated_log import SimulatedChunk, SimulatedLog
from vista.simulation.topic_index import IntArray, TopicIndex

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


class ShareWorld:
    """A click depends on the share of the candidate's topic in the whole history."""

    tasks = ("click", "like", "long_view")

    def make_chunk(
        self, config: SimulateConfig, catalog: Catalog, lengths: NDArray[np.int64], seed: np.random.SeedSequence
    ) -> SimulatedChunk:
        """Draw the events and impressions of users with `lengths` [U] events, each at least 1."""
        rng = np.random.Generator(np.random.SFC64(seed))
        offsets = offsets_of(lengths)
        interests = draw_interests(rng, config, offsets, *draw_orders(rng, config, len(lengths)))
        events, episode = draw_events(rng, config, catalog, offsets, interests)
        requests = draw_requests(rng, config, offsets, events.timestamp)
        user, stop = requests.user, requests.stop
        candidate = _draw_candidates(rng, interests, user, episode[stop - 1])
        chosen = draw_items(rng, config, catalog, candidate, requests.time)
        index = TopicIndex(catalog.topic[events.item])
        start = offsets[user]
        long_term = affinity(index.count(candidate, start, stop), stop - start)
        recent = recent_match(index.count(candidate, np.maximum(start, stop - RECENT_EVENTS), stop))
        features = np.stack([np.ones(len(user)), long_term, recent, catalog.quality[chosen]], axis=1)
        probability = (1 / (1 + np.exp(-(features @ LOGITS.T)))).astype(np.float32)
        label = (rng.random(probability.shape, dtype=np.float32) < probability).astype(np.int8)
        label[:, 1:][label[:, 0] == 0] = -1
        age = index.age(candidate, start, stop)
        return SimulatedChunk(
            events.item, events.timestamp, events.action, chosen, requests.time, stop - start, label, probability, age
        )

    def window_features(self, log: SimulatedLog, window: int | None, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
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


def _draw_candidates(
    rng: np.random.Generator, interests: Interests, user: NDArray[np.int64], episode: NDArray[np.int64]
) -> NDArray[np.uint8]:
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


def _joint(left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.float64]:
    """One-hot cells [N, 64] of pairs of codes in 0..7."""
    return np.asarray(np.eye(64)[left * 8 + right])
