"""EASE, TIFU-KNN, and counter trees: against plain loops and other formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluation.baselines.conftest import HOUR, order_only_log, quality, visible_items
from tests.evaluation.baselines.test_counting_baselines import TIES, scores_of
from vista.arrays import Floats, Int
from vista.evaluation.cases import window_cases
from vista.evaluation.counting_baselines import (
    CountingBaseline,
    Ease,
    OwnFrequency,
    Popularity,
    TifuKnn,
    TransitionsAndOwn,
    Tuned,
)
from vista.evaluation.trained_baselines import (
    CounterTrees,
    PooledFactors,
    PooledItemVectors,
    counter_features,
    training_questions,
)
from vista.examples.item_statistics import item_factors
from vista.log.event_log import EventLog


def test_ease_minimizes_its_loss(shopping: tuple[EventLog, Int]) -> None:
    """Column j of B minimizes |x_j - X b|² + ridge |b|² with b_j = 0: here as a regression on the other columns."""
    log, counts = shopping
    ridge = 7.0
    had = np.zeros((log.num_users, log.num_items))
    for user, history in enumerate(visible_items(log, counts)):
        had[user, history] = 1
    expected = np.zeros_like(had)
    for item in range(log.num_items):
        others = np.delete(had, item, axis=1)
        weights = np.linalg.solve(others.T @ others + ridge * np.eye(log.num_items - 1), others.T @ had[:, item])
        expected[:, item] = others @ weights
    np.testing.assert_allclose(scores_of(Ease(ridge=ridge), log, counts), expected, atol=1e-9)


def test_ease_ranks_rare_items_last_by_popularity(tmp_path: Path) -> None:
    log = order_only_log([[0, 1, 2, 2], [0, 1, 3, 3, 3], [0, 1, 4]], tmp_path)
    scores = scores_of(Ease(num_items=2), log, np.array([2, 5, 3]))  # the two items are 0 and 1, or 3 after a tie
    ranked = np.argsort(-scores, axis=1)
    assert (scores[:, ranked[0, 2:]] < scores[:, ranked[0, :2]].min(axis=1, keepdims=True)).all()
    assert scores[0, 4] > scores[0, 2], "one event and none"


def plain_tifu(log: EventLog, counts: Int, within: float, group: float, num_groups: int) -> list[np.ndarray]:
    """v_u of every user, basket by basket."""
    vectors = []
    for user, count in enumerate(counts.tolist()):
        history = log.slice(user, 0, count)
        baskets: list[set[int]] = []
        for place, item in enumerate(history.item.tolist()):
            if place == 0 or history.timestamp[place] - history.timestamp[place - 1] > HOUR / 2:
                baskets.append(set())
            baskets[-1].add(item)
        m = min(num_groups, len(baskets))
        base, extra = divmod(len(baskets), m) if m else (0, 0)
        sizes = [base] * (m - extra) + [base + 1] * extra
        vector, start = np.zeros(log.num_items), 0
        for i, k in enumerate(sizes):
            for j, basket in enumerate(baskets[start : start + k]):
                vector[list(basket)] += group ** (m - 1 - i) / m * within ** (k - 1 - j) / k
            start += k
        vectors.append(vector)
    return vectors


@pytest.mark.parametrize("num_groups", [4, 1000])
def test_tifu_knn_counts_basket_by_basket(shopping: tuple[EventLog, Int], num_groups: int) -> None:
    log, counts = shopping
    baseline = TifuKnn(within_decay=0.8, group_decay=0.6, num_groups=num_groups, num_neighbors=5, own_weight=0.3)
    scores = scores_of(baseline, log, counts)
    vectors = plain_tifu(log, counts, 0.8, 0.6, num_groups)
    for user, vector in enumerate(vectors):
        distance = [
            np.linalg.norm(vector - other) if number != user else np.inf for number, other in enumerate(vectors)
        ]
        nearest = np.mean([vectors[number] for number in np.argsort(distance)[:5]], axis=0)
        np.testing.assert_allclose(scores[user], 0.3 * vector + 0.7 * nearest, atol=2 * TIES)


def test_without_times_every_event_is_a_basket(tmp_path: Path) -> None:
    log = order_only_log([[0, 0, 1], [0]], tmp_path)
    baseline = TifuKnn(within_decay=1, group_decay=1, num_groups=1, num_neighbors=1, own_weight=1)
    np.testing.assert_allclose(scores_of(baseline, log, log.lengths), [[2 / 3, 1 / 3], [1, 0]], atol=TIES)


@pytest.mark.parametrize("asked_later", [False, True])
def test_counter_features_count_event_by_event(shopping: tuple[EventLog, Int], asked_later: bool) -> None:
    log, _ = shopping
    users, popularity = np.array([3, 0, 40]), np.arange(log.num_items)
    seen = np.array([90, 5, 12])
    newest = np.array([log.slice(int(user)).timestamp[count - 1] for user, count in zip(users, seen, strict=True)])
    now = newest + 50 * HOUR if asked_later else None
    features = counter_features(log, users, seen, now, popularity)
    expected, cells = [], []
    for row, (user, count) in enumerate(zip(users.tolist(), seen.tolist(), strict=True)):
        history = log.slice(user, 0, count)
        asked = newest[row] if now is None else now[row]
        for item in np.unique(history.item):
            places = np.flatnonzero(history.item == item)
            ages = count - 1 - places
            days = (asked - history.timestamp[places]) / (24 * HOUR)
            cells.append((row, item))
            expected.append(
                [
                    len(places),
                    (ages < 32).sum(),
                    (ages < 200).sum(),
                    np.exp(-ages / 32).sum(),
                    np.exp(-ages / 200).sum(),
                    ages.min(),
                    np.log(count),
                    popularity[item],
                    np.exp(-days / 7).sum(),
                    np.exp(-days / 30).sum(),
                    np.exp(-days / 90).sum(),
                    days.min(),
                    days.max(),
                ]
            )
    assert list(zip(features.row, features.item, strict=True)) == cells
    np.testing.assert_allclose(features.value, expected)


@pytest.mark.parametrize("at_one_time", [True, False])
def test_windows_of_training_questions_end_before_the_cut(shopping: tuple[EventLog, Int], at_one_time: bool) -> None:
    log, counts = shopping
    questions = training_questions(log, counts, 20, at_one_time=at_one_time)
    assert any(len(cases) for _, cases in questions)
    for before, cases in questions:
        assert (before <= counts).all() and cases.seen.tolist() == before[cases.user].tolist()
        assert (cases.seen >= 50).all() and (cases.seen + 20 <= counts[cases.user]).all()
        assert (cases.now is not None) == at_one_time
        if cases.now is not None:
            for user, seen, now in zip(cases.user.tolist(), cases.seen, cases.now, strict=True):
                times = log.slice(user).timestamp
                assert times[seen - 1] < now <= times[seen]


def test_counter_trees_rank_returns_before_new_items(shopping: tuple[EventLog, Int]) -> None:
    log, counts = shopping
    seen = counts - 30
    trees = CounterTrees(horizon_events=15, at_one_time=False)
    trees.fit(log, seen, np.random.default_rng(0))
    scores = trees.scores(np.arange(40), seen[:40], None)
    for user, history in enumerate(visible_items(log, seen)[:40]):
        is_new = ~np.isin(np.arange(log.num_items), history)
        assert scores[user, is_new].max(initial=0) < TIES < scores[user, ~is_new].min()
    cases = window_cases(log, seen, counts, horizon_events=15, min_seen=50, min_after=20)
    popularity = Popularity()
    popularity.fit(log, seen, np.random.default_rng(0))
    assert quality(trees, log, cases, "precision@5") > quality(popularity, log, cases, "precision@5") + 0.15


def test_without_a_question_counter_trees_rank_by_popularity(tmp_path: Path) -> None:
    log = order_only_log([[0, 1], [1]], tmp_path)
    scores = scores_of(CounterTrees(horizon_events=5, at_one_time=False), log, log.lengths)
    assert (scores[:, 1] > scores[:, 0]).all()


def test_tuned_chooses_by_the_last_visible_events(tmp_path: Path) -> None:
    """Items step through a cycle, so the next one is known from the newest, and never from the frequency alone."""
    cycle = [[(start + step * step) % 7 for step in range(40)] for start in range(20)]
    steps = [[(start + step) % 7 for step in range(40 + start)] for start in range(20)]
    for histories, best in ((steps, 3.0), (cycle, 0.01)):
        log = order_only_log(histories, tmp_path / f"{best}")
        blend = Tuned(TransitionsAndOwn(1.0), [0.01, 3.0], horizon_events=1)
        blend.fit(log, log.lengths, np.random.default_rng(0))
        assert blend.chosen == best


class Recent(OwnFrequency):
    """Own frequency of the last events, with the cuts that it was fitted to."""

    def __init__(self) -> None:
        super().__init__(last=1)
        self.cuts: list[Int] = []

    def choose(self, value: int) -> None:
        self._last = value

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        super().fit(log, counts, rng)
        self.cuts.append(counts)


def test_tuned_fits_the_chosen_one_to_all_visible_events(shopping: tuple[EventLog, Int]) -> None:
    """Two fits, whatever the number of values; the first without the last 10 events of the users that are asked."""
    log, counts = shopping
    for horizon, best in ((10, 60), (1000, 1)):  # no user has 1,000 events
        recent = Recent()
        tuned = scores_of(Tuned(recent, [1, 60, 2], horizon_events=horizon), log, counts)
        np.testing.assert_array_equal(tuned, scores_of(OwnFrequency(last=best), log, counts))
        np.testing.assert_array_equal(recent.cuts[-1], counts)
        for held in recent.cuts[:-1]:
            np.testing.assert_array_equal(held, np.where(counts >= 20, counts - 10, counts))
        assert len(recent.cuts) == (2 if horizon == 10 else 1)


class GuessesNew:
    """Puts the most popular items first, either those that the user had or the new ones."""

    name = "guess"

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._own, self._popularity = OwnFrequency(), Popularity()
        self._own.fit(log, counts, rng)
        self._popularity.fit(log, counts, rng)

    def choose(self, value: bool) -> None:
        self._new_first = value

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        had = self._own.scores(user, seen, now) >= 1
        popularity = self._popularity.scores(user, seen, now)
        return np.where(had, 1.0, 1e6) * popularity if self._new_first else np.where(had, 1e6, -1.0) * popularity


def test_long_windows_are_tuned_for_new_items(tmp_path: Path) -> None:
    """Among many new items per window, the popular ones come next. In all, each user returns to favorites."""
    rng = np.random.default_rng(0)
    histories = []
    for _ in range(12):
        favorites, others = rng.choice(60, 8, replace=False), 60 + np.minimum(rng.geometric(0.02, 400), 240)
        histories.append(np.where(rng.random(400) < 0.8, rng.choice(favorites, 400), others).tolist())
    histories.append(list(range(301)))
    log = order_only_log(histories, tmp_path)
    chosen = {}
    for horizon in (50, 60):
        tuned = Tuned(GuessesNew(), [False, True], horizon_events=horizon)
        tuned.fit(log, log.lengths, np.random.default_rng(0))
        chosen[horizon] = tuned.chosen
    assert chosen == {50: False, 60: True}


def test_a_baseline_chooses_as_if_it_were_made_with_the_value(shopping: tuple[EventLog, Int]) -> None:
    log, counts = shopping
    pairs: list[tuple[Any, Any, CountingBaseline]] = [
        (Ease(), 200.0, Ease(ridge=200.0)),
        (TransitionsAndOwn(1.0), 0.3, TransitionsAndOwn(0.3)),
        (TifuKnn(), (0.9, 0.3), TifuKnn(group_decay=0.9, own_weight=0.3)),
        (
            PooledItemVectors(horizon_events=20, dim=8),
            (0.3, 0.01),
            PooledItemVectors(horizon_events=20, dim=8, temperature=0.3, learning_rate=0.01),
        ),
    ]
    for baseline, value, other in pairs:
        default = scores_of(baseline, log, counts)
        baseline.choose(value)
        chosen = baseline.scores(np.arange(log.num_users), counts, None)
        assert not np.array_equal(default, chosen)
        np.testing.assert_array_equal(chosen, scores_of(other, log, counts), err_msg=other.name)


def test_pooled_factors_by_a_loop(shopping: tuple[EventLog, Int]) -> None:
    """No user has a window of 1,000 events, so the score is the cosine with the mean of the history's vectors."""
    log, counts = shopping
    scores = scores_of(PooledFactors(horizon_events=1000, dim=4), log, counts)
    seed = int(np.random.default_rng(0).integers(1 << 31))
    rows, factors = item_factors(log, np.arange(log.num_items) + 1, counts, 4, seed=seed)
    unit = {row - 1: vector / np.linalg.norm(vector) for row, vector in zip(rows.tolist(), factors, strict=True)}
    for user, history in enumerate(visible_items(log, counts)):
        mean = np.sum([unit.get(item, np.zeros(4)) for item in history], axis=0)
        for item in range(log.num_items):
            expected = unit.get(item, np.zeros(4)) @ mean / np.linalg.norm(mean)
            assert scores[user, item] == pytest.approx(expected, abs=1e-5)


def test_pooled_factors_learn_which_items_go_together(tmp_path: Path) -> None:
    """Users choose from one of three groups of 20 items, and change the group every 60 events."""
    rng = np.random.default_rng(0)
    groups = np.repeat(rng.integers(0, 3, (60, 4)), 60, axis=1)
    histories = (20 * groups + rng.integers(0, 20, groups.shape)).tolist()
    log = order_only_log(histories, tmp_path)
    seen = np.full(log.num_users, 200)
    cases = window_cases(log, seen, None, horizon_events=20, min_seen=50, min_after=20)
    reached = []
    for baseline in (PooledFactors(horizon_events=20, dim=8), Popularity()):
        baseline.fit(log, seen, np.random.default_rng(0))
        reached.append(quality(baseline, log, cases, "precision@10"))
    assert reached[0] > reached[1] + 0.2


def test_a_user_without_events_gets_the_popular_items_of_pooled_factors(shopping: tuple[EventLog, Int]) -> None:
    log, counts = shopping
    baseline = PooledFactors(horizon_events=20, dim=4)
    baseline.fit(log, counts, np.random.default_rng(0))
    scores = baseline.scores(np.array([0, 0, 1]), np.array([0, 50, 50]), None)
    popularity = Popularity()
    popularity.fit(log, counts, np.random.default_rng(0))
    expected = popularity.scores(np.array([0]), counts[:1], None)[0]
    assert np.abs(np.corrcoef(scores[0], np.log1p(expected))[0, 1]) == pytest.approx(1)
    np.testing.assert_allclose(scores[1:], baseline.scores(np.array([0, 1]), np.array([50, 50]), None))
