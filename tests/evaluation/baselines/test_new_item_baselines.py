"""New-item trees and pooled vectors: features, means, and order against loops, and what they learn."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.baselines.conftest import HOUR, order_only_log, quality, timed_log, visible_items
from vista.arrays import Int
from vista.errors import MissingDependencyError
from vista.evaluation import trained_baselines
from vista.evaluation.cases import window_cases
from vista.evaluation.counting_baselines import Ease, ItemNeighbors, OwnFrequency, Popularity
from vista.evaluation.trained_baselines import (
    CounterTrees,
    NewItemFeatures,
    NewItemTrees,
    PooledItemVectors,
    factor_vectors,
)
from vista.log.event_log import EventLog


@pytest.mark.parametrize("asked_later", [False, True])
def test_features_count_event_by_event(
    shopping: tuple[EventLog, Int], monkeypatch: pytest.MonkeyPatch, asked_later: bool
) -> None:
    log, counts = shopping
    monkeypatch.setattr(trained_baselines, "_CANDIDATES", 5)
    monkeypatch.setattr(trained_baselines, "_DIM", 4)
    users, seen = np.array([3, 0, 40]), np.array([30, 5, 12])
    newest = log.gather_ranges(users, seen - 1, seen).timestamp
    now = newest + 700 * HOUR if asked_later else None
    features = NewItemFeatures(log, counts, np.random.default_rng(0))
    found = features.candidates(users, seen, now)
    assert found.item.shape == (3, 5) and found.is_new.all()

    rng = np.random.default_rng(0)
    neighbors, ease = ItemNeighbors(), Ease()
    neighbors.fit(log, counts, rng)
    ease.fit(log, counts, rng)
    vectors = factor_vectors(log, counts, 4, int(rng.integers(1 << 31)))
    near, linear = (baseline.scores(users, seen, now) for baseline in (neighbors, ease))
    visible = [log.slice(user, 0, int(count)) for user, count in enumerate(counts)]
    events = [(item, time) for each in visible for item, time in zip(each.item.tolist(), each.timestamp, strict=True)]
    for row, (user, count) in enumerate(zip(users.tolist(), seen.tolist(), strict=True)):
        history = log.slice(user, 0, count).item.tolist()
        new = [item for item in np.argsort(-near[row], kind="stable").tolist() if item not in history]
        assert found.item[row].tolist() == new[:5]
        asked = newest[row] if now is None else now[row]
        for place, item in enumerate(new[:5]):
            cosines = []
            for last in (32, 200, count):
                mean = vectors[history[-last:]].sum(axis=0)
                cosines.append(vectors[item] @ mean / np.linalg.norm(mean))
            times = [time for other, time in events if other == item]
            recent = sum(asked - 30 * 24 * HOUR < time <= asked for time in times)
            expected = [
                *np.log1p([place, count, len(times)]),
                near[row, item],
                linear[row, item],
                *cosines,
                np.log1p(recent),
            ]
            np.testing.assert_allclose(found.value[row, place], expected, atol=1e-8)


def test_recent_popularity_ends_with_the_question(tmp_path: Path) -> None:
    """Item 1 occurs 31 and 29 days before the newest event of user 0 and one hour after it."""
    day = 24.0
    log = timed_log([[(0, 50 * day)], [(1, 19 * day), (1, 21 * day), (1, 50 * day + 1)], [(2, 60 * day)]], tmp_path)
    features = NewItemFeatures(log, log.lengths, np.random.default_rng(0))
    first = 1_600_000_000_000
    later = np.array([first + int(50 * day + 2) * HOUR, first])
    for now, expected in ((None, [1, 1]), (later, [2, 0])):
        found = features.candidates(np.array([0, 2]), np.array([1, 1]), now)
        recent = [found.value[row, found.item[row] == 1, -1].item() for row in (0, 1)]
        np.testing.assert_allclose(np.expm1(recent), expected, atol=1e-8)


def test_a_user_who_had_all_items_has_no_candidate(tmp_path: Path) -> None:
    log = order_only_log([[0, 1, 2], [0, 1]], tmp_path)
    found = NewItemFeatures(log, log.lengths, np.random.default_rng(0)).candidates(np.arange(2), log.lengths, None)
    assert found.is_new.sum(axis=1).tolist() == [0, 1]
    assert found.item[1][found.is_new[1]].tolist() == [2]


@pytest.fixture(scope="module")
def discovery(tmp_path_factory: pytest.TempPathFactory) -> tuple[EventLog, Int]:
    """Users take items of one third of the catalog. First they return; the last 30 items come last."""
    rng = np.random.default_rng(0)
    histories = []
    for _ in range(150):
        start = 60 * int(rng.integers(0, 3))
        own = start + rng.permutation(60)
        histories.append([*rng.choice(own[:30], 60), *rng.permutation(own[:45])[:40].tolist(), *own[30:].tolist()])
    histories.append(list(range(180)))
    log = order_only_log(histories, tmp_path_factory.mktemp("discovery"))
    return log, np.minimum(log.lengths, 100)


@pytest.fixture(scope="module")
def trees(discovery: tuple[EventLog, Int]) -> NewItemTrees:
    fitted = NewItemTrees(horizon_events=20, at_one_time=False)
    fitted.fit(*discovery, np.random.default_rng(0))
    return fitted


def test_trees_rank_new_items_below_returns(discovery: tuple[EventLog, Int], trees: NewItemTrees) -> None:
    log, counts = discovery
    own = OwnFrequency(events=200)
    own.fit(log, counts, np.random.default_rng(0))
    scores, expected = (baseline.scores(np.arange(40), counts[:40], None) for baseline in (trees, own))
    for user, history in enumerate(visible_items(log, counts)[:40]):
        had = np.isin(np.arange(log.num_items), history)
        assert 0 < scores[user, ~had].max() < 1 < scores[user, had].min()
        np.testing.assert_array_equal(scores[user, had], 1 + expected[user, had])
    alone = [trees.scores(np.array([user]), counts[[user]], None)[0] for user in range(8)]
    np.testing.assert_array_equal(scores[:8], alone)


def test_trees_learn_which_new_items_come_next(discovery: tuple[EventLog, Int], trees: NewItemTrees) -> None:
    log, counts = discovery
    cases = window_cases(log, counts, None, horizon_events=20, min_seen=50, min_after=20)
    popularity = Popularity()
    popularity.fit(log, counts, np.random.default_rng(0))
    learned, counted = (quality(each, log, cases, "precision@10:new") for each in (trees, popularity))
    assert learned > counted + 0.2


def test_other_new_items_rank_last_by_popularity(
    discovery: tuple[EventLog, Int], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, counts = discovery
    monkeypatch.setattr(trained_baselines, "_CANDIDATES", 10)
    trees = NewItemTrees(horizon_events=15, at_one_time=False)
    trees.fit(log, counts, np.random.default_rng(0))
    (scores,) = trees.scores(np.array([0]), counts[:1], None)
    popularity = Popularity()
    popularity.fit(log, counts, np.random.default_rng(0))
    (count,) = popularity.scores(np.array([0]), counts[:1], None)
    had = np.isin(np.arange(log.num_items), visible_items(log, counts)[0])
    others = np.flatnonzero(scores < 1e-9)
    assert len(others) == log.num_items - had.sum() - 10
    assert (np.argsort(scores[others], kind="stable") == np.argsort(count[others], kind="stable")).all()


def test_without_a_question_new_items_rank_by_popularity(tmp_path: Path) -> None:
    log = order_only_log([[0, 1, 2], [1], [3, 3]], tmp_path)
    trees = NewItemTrees(horizon_events=5, at_one_time=False)
    trees.fit(log, log.lengths, np.random.default_rng(0))
    (scores,) = trees.scores(np.array([1]), np.array([1]), None)
    assert np.argsort(-scores).tolist()[:2] == [1, 3]


@pytest.mark.parametrize("trees", [NewItemTrees, CounterTrees])
def test_trees_name_the_extra_that_they_need(
    monkeypatch: pytest.MonkeyPatch, trees: type[NewItemTrees | CounterTrees]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[baselines\]'"):
        trees(horizon_events=50, at_one_time=True)


def test_without_a_window_the_vectors_are_those_they_start_from(shopping: tuple[EventLog, Int]) -> None:
    """No user has a window of 1,000 events, so the score is the cosine with the sum of four means, and popularity."""
    log, counts = shopping
    baseline = PooledItemVectors(horizon_events=1000, dim=4, temperature=0.25)
    baseline.fit(log, counts, np.random.default_rng(0))
    scores = baseline.scores(np.arange(log.num_users), counts, None)
    vectors = factor_vectors(log, counts, 4, int(np.random.default_rng(0).integers(1 << 31)))
    known = np.flatnonzero(vectors.any(axis=1))
    assert len(known) > log.num_items / 2
    histories = visible_items(log, counts)
    popularity = np.bincount(np.concatenate([np.array(history, int) for history in histories]), minlength=log.num_items)
    for user in np.flatnonzero(counts > 0).tolist():
        history = histories[user]
        if not np.isin(history, known).all():
            continue
        wanted = np.zeros(4)
        for weigh in (lambda age: age < 32, lambda age: age < 200, lambda age: 1, lambda age: np.exp(-age / 200)):
            mean = sum(weigh(age) * vectors[item] for age, item in enumerate(history[::-1]))
            wanted += mean / np.linalg.norm(mean)
        cosine = vectors[known] @ wanted / np.linalg.norm(wanted)
        np.testing.assert_allclose(scores[user, known], cosine / 0.25 + np.log1p(popularity[known]), atol=1e-5)


def test_training_follows_the_items_of_the_next_events(
    shopping: tuple[EventLog, Int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step shows the items of a window and the vectors that scores would compare them with."""
    log, counts = shopping
    steps = []

    def recorded(user: torch.Tensor, items: torch.Tensor, label: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        steps.append((user.detach().double().numpy(), items.detach().double().numpy(), label.numpy()))
        return user.sum() * 0

    monkeypatch.setattr(trained_baselines, "window_loss", recorded)
    baseline = PooledItemVectors(horizon_events=7, dim=4, temperature=0.2)
    baseline.fit(log, counts, np.random.default_rng(0))
    trained = baseline.scores(np.arange(log.num_users), counts, None)  # without a gradient, the start
    assert steps and trained.shape == (log.num_users, log.num_items)
    places = defaultdict(list)
    for user, history in enumerate(visible_items(log, counts)):
        for place in range(1, len(history) - 6):
            places[frozenset(history[place : place + 7])].append((user, place))
    users, items, labels = steps[0]
    for vector, label in zip(users, labels, strict=True):
        window = label[label >= 0].tolist()
        assert len(window) == len(set(window)), "labels are distinct"
        asked = np.array(places[frozenset(window)])  # several places may have the same items after them
        expected = baseline.scores(asked[:, 0], asked[:, 1], None)
        assert np.abs(expected - items @ vector / 0.2).max(axis=1).min() < 1e-4


def test_pooled_vectors_learn_what_comes_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users step from one group of 20 items to the next one, 20 events in each. The start only knows the groups."""
    monkeypatch.setattr(trained_baselines, "_SPACING", 1)
    rng = np.random.default_rng(0)
    groups = np.repeat((rng.integers(0, 5, (60, 1)) + np.arange(12)) % 5, 20, axis=1)
    log = order_only_log((20 * groups + rng.integers(0, 20, groups.shape)).tolist(), tmp_path)
    seen = np.full(log.num_users, 200)
    cases = window_cases(log, seen, None, horizon_events=20, min_seen=50, min_after=20)
    reached = []
    for horizon in (20, 1000):  # no user has 1,000 events
        baseline = PooledItemVectors(horizon_events=horizon, dim=8, learning_rate=0.03)
        baseline.fit(log, seen, np.random.default_rng(0))
        reached.append(quality(baseline, log, cases, "precision@10"))
    assert reached[0] > reached[1] + 0.3


def test_a_user_without_events_gets_the_popular_items(shopping: tuple[EventLog, Int]) -> None:
    log, counts = shopping
    baseline = PooledItemVectors(horizon_events=10, dim=4)
    baseline.fit(log, counts, np.random.default_rng(0))
    (scores,) = baseline.scores(np.array([0]), np.array([0]), None)
    items = np.concatenate([np.array(history, int) for history in visible_items(log, counts)])
    popularity = np.log1p(np.bincount(items, minlength=log.num_items))
    assert np.corrcoef(scores, popularity)[0, 1] == pytest.approx(1)
