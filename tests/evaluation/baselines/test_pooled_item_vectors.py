"""Pooled vectors: their start against a loop, the means of a step against those of scores, and what they learn."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.baselines.conftest import order_only_log, quality, visible_items
from vista.arrays import Int
from vista.evaluation.baselines import pooled_item_vectors
from vista.evaluation.baselines.pooled_item_vectors import PooledItemVectors
from vista.evaluation.baselines.pooled_means import factor_vectors
from vista.evaluation.window_cases import window_cases
from vista.log.event_log import EventLog


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

    monkeypatch.setattr(pooled_item_vectors, "window_loss", recorded)
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
    monkeypatch.setattr(pooled_item_vectors, "_SPACING", 1)
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
