"""Popularity, own frequency, transitions, and item neighbors: by hand, and against plain loops."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.baselines.conftest import HOUR, order_only_log, timed_log, visible_items
from vista.arrays import Floats, Int
from vista.evaluation.baselines.counting_baseline import CountingBaseline
from vista.evaluation.baselines.item_neighbors import ItemNeighbors
from vista.evaluation.baselines.own_frequency import OwnFrequency
from vista.evaluation.baselines.popularity import Popularity
from vista.evaluation.baselines.transitions import Transitions, TransitionsAndOwn
from vista.examples.pair_counts import REACH
from vista.log.event_log import EventLog

TIES = 1e-9


def scores_of(baseline: CountingBaseline, log: EventLog, counts: Int, now: Int | None = None) -> Floats:
    """Scores for all users, each asked after their visible events."""
    baseline.fit(log, counts, np.random.default_rng(0))
    return baseline.scores(np.arange(log.num_users), counts, now)


def test_popularity_by_hand(tmp_path: Path) -> None:
    log = order_only_log([[0, 1, 1, 2], [1, 0]], tmp_path)
    assert scores_of(Popularity(), log, np.array([3, 1])).tolist() == [[1, 3, 0]] * 2


def test_own_frequency_by_hand(tmp_path: Path) -> None:
    day = 24.0
    log = timed_log([[(0, 0.0), (1, day), (0, 3 * day), (2, 9 * day)], [(1, 0.0), (2, day)]], tmp_path)
    counts = np.array([3, 2])
    expected = {
        OwnFrequency(): [[2, 1, 0], [0, 1, 1]],
        OwnFrequency(last=2): [[1, 1, 0], [0, 1, 1]],
        OwnFrequency(days=2): [[1 + np.exp(-1.5), np.exp(-1), 0], [0, np.exp(-0.5), 1]],
        OwnFrequency(events=4): [[1 + np.exp(-0.5), np.exp(-0.25), 0], [0, np.exp(-0.25), 1]],
    }
    for baseline, values in expected.items():
        np.testing.assert_allclose(scores_of(baseline, log, counts), values, atol=TIES)
    assert [baseline.name for baseline in expected] == [
        "own frequency",
        "own frequency, last 2 events",
        "own frequency, decay 2 days",
        "own frequency, decay 4 events",
    ]


def test_items_that_tie_rank_by_popularity(tmp_path: Path) -> None:
    log = order_only_log([[0, 1], [2, 3, 3], [3]], tmp_path)
    for baseline in (OwnFrequency(), TransitionsAndOwn(0.5), ItemNeighbors()):
        scores = scores_of(baseline, log, log.lengths)
        assert scores[0, 3] > scores[0, 2] > 0, f"{baseline.name}: both are new and unrelated to the first user"
        assert scores[0, 3] < TIES


def test_own_frequency_counts_event_by_event(shopping: tuple[EventLog, Int]) -> None:
    log, counts = shopping
    got = {name: scores_of(baseline, log, counts) for name, baseline in own_frequencies().items()}
    for user, count in enumerate(counts.tolist()):
        history = log.slice(user, 0, count)
        for name, scores in got.items():
            expected = np.zeros(log.num_items)
            for age, (item, time) in enumerate(zip(history.item[::-1], history.timestamp[::-1], strict=True)):
                days = (history.timestamp[-1] - time) / (24 * HOUR)
                expected[item] += {
                    "whole": 1.0,
                    "last": float(age < 20),
                    "days": np.exp(-days / 9),
                    "events": np.exp(-age / 11),
                }[name]
            np.testing.assert_allclose(scores[user], expected, atol=2 * TIES)


def own_frequencies() -> dict[str, OwnFrequency]:
    return {
        "whole": OwnFrequency(),
        "last": OwnFrequency(last=20),
        "days": OwnFrequency(days=9),
        "events": OwnFrequency(events=11),
    }


def test_transitions_by_hand(tmp_path: Path) -> None:
    log = order_only_log([[0, 1, 2], [0, 1, 3], [4, 0, 1], [1, 3, 4, 2]], tmp_path)
    # Visible: 0 1 | 0 1 | 4 0 | 1 3 4, so 0 1 occurs twice; 4 0, 1 3, and 3 4 once. Popularity is 3 3 0 1 2.
    counts = log.lengths - 1
    popularity = [3, 3, 0, 1, 2]
    after = {1: [0, 0, 0, 1, 0], 0: [0, 2, 0, 0, 0], 4: [1, 0, 0, 0, 0]}
    newest = [1, 1, 0, 4]
    scores = scores_of(Transitions(), log, counts)
    assert scores.tolist() == [[4 * n + p for n, p in zip(after[j], popularity, strict=True)] for j in newest]
    own = np.array([[0.5, 0.5, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0.5, 0, 0, 0, 0.5], [0, 1 / 3, 0, 1 / 3, 1 / 3]])
    share = np.array([[0, 0, 0, 1, 0], [0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    np.testing.assert_allclose(scores_of(TransitionsAndOwn(0.2), log, counts), own + 0.2 * share, atol=TIES)


def test_transitions_count_event_by_event(shopping: tuple[EventLog, Int]) -> None:
    log, counts = shopping
    visible = visible_items(log, counts)
    pairs = Counter(pair for history in visible for pair in pairwise(history))
    leaving = Counter(one for history in visible for one, _ in pairwise(history))
    popularity = Counter(item for history in visible for item in history)
    weight = max(popularity.values()) + 1
    plain, blend = scores_of(Transitions(), log, counts), scores_of(TransitionsAndOwn(2), log, counts)
    for user, history in enumerate(visible):
        own = Counter(history)
        last = history[-1]
        for item in range(log.num_items):
            assert plain[user, item] == pairs[last, item] * weight + popularity[item]
            expected = own[item] / len(history) + 2 * pairs[last, item] / leaving[last]
            assert blend[user, item] == pytest.approx(expected, abs=TIES)


def test_a_user_without_events_gets_popular_items(tmp_path: Path) -> None:
    log = order_only_log([[0, 1, 1], [2, 1]], tmp_path)
    counts = np.array([3, 0])
    for baseline in (OwnFrequency(), Transitions(), TransitionsAndOwn(1), ItemNeighbors()):
        assert np.argsort(-scores_of(baseline, log, counts)[1]).tolist() == [1, 0, 2]


@pytest.mark.parametrize("last", [None, 7])
def test_item_neighbors_count_pair_by_pair(shopping: tuple[EventLog, Int], last: int | None) -> None:
    log, counts = shopping
    visible = visible_items(log, counts)
    popularity = Counter(item for history in visible for item in history)
    near: Counter[tuple[int, int]] = Counter()
    for history in visible:
        for place, one in enumerate(history):
            for other in history[place + 1 : place + 1 + REACH]:
                if one != other:
                    near[one, other] += 1
                    near[other, one] += 1
    scores = scores_of(ItemNeighbors(last=last), log, counts)
    for user, history in enumerate(visible):
        for item in range(log.num_items):
            expected = sum(
                near[had, item] / np.sqrt(popularity[had] * max(popularity[item], 1))
                for had in (history[-last:] if last else history)
            )
            assert scores[user, item] == pytest.approx(expected, abs=TIES)
