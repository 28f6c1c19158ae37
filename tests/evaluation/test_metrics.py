"""Metrics against scikit-learn, against hand-computed numbers, and under properties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vista.evaluation.comparison import drawn_aucs
from vista.evaluation.metrics import (
    auc,
    auc_values,
    calibration,
    gauc,
    log_loss,
    log_loss_values,
    mean_and_error,
    normalized_entropy,
    ranks_of_targets,
)
from vista.evaluation.protocol import ranking_metrics

# Few distinct scores, so that ties are common.
ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(-3, 3)), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def sk() -> Any:
    """sklearn.metrics, which is slow to import."""
    from sklearn import metrics

    return metrics


def columns(rows: list[tuple[int, int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    group, label, score = np.array(rows).T
    return group, label, score / 3


@settings(max_examples=40)
@given(ROWS)
def test_auc_equals_scikit_learn(sk: Any, rows: list[tuple[int, int, int]]) -> None:
    _, label, score = columns(rows)
    if len(set(label)) == 1:
        assert math.isnan(auc(label, score))
    else:
        assert auc(label, score) == pytest.approx(sk.roc_auc_score(label, score), abs=1e-12)
    assert auc([1, 0, 1], [-math.inf, 0.0, math.inf]) == 0.5


@settings(max_examples=40)
@given(ROWS)
def test_values_of_users_have_the_metric_of_all_rows_as_their_mean(rows: list[tuple[int, int, int]]) -> None:
    user, label, score = columns(rows)
    _, user = np.unique(user, return_inverse=True)
    np.testing.assert_allclose(auc_values(user, label, score).mean(), auc(label, score), atol=1e-12)
    probability = 1 / (1 + np.exp(-score))
    np.testing.assert_allclose(log_loss_values(user, label, probability).mean(), log_loss(label, probability))


def test_errors_over_users_are_those_of_drawing_users_again() -> None:
    """Users differ in their numbers of rows, in their rates, and in how well they are predicted."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(150), rng.integers(1, 60, 150))
    bias = rng.normal(size=150)[user]
    signal = rng.normal(size=len(user))
    label = (rng.random(len(user)) < 1 / (1 + np.exp(-bias - signal))).astype(np.float32)
    probability = 1 / (1 + np.exp(-signal * rng.random(150)[user]))
    draws = drawn_aucs(user, label, {"x": probability})["x"]
    _, error = mean_and_error(auc_values(user, label, probability))
    assert error == pytest.approx(draws.std(), rel=0.2)  # 200 draws: an error of 5 % of their spread
    losses = []
    for _ in range(400):
        drawn = rng.integers(0, 150, 150)
        rows = np.concatenate([np.flatnonzero(user == one) for one in drawn])
        losses.append(log_loss(label[rows], probability[rows]))
    _, error = mean_and_error(log_loss_values(user, label, probability))
    assert error == pytest.approx(np.std(losses), rel=0.2)


@settings(max_examples=40)
@given(ROWS)
def test_gauc_equals_a_loop_over_groups(sk: Any, rows: list[tuple[int, int, int]]) -> None:
    group, label, score = columns(rows)
    total, weight = 0.0, 0
    for g in set(group):
        own = group == g
        if len(set(label[own])) == 2:
            total += own.sum() * sk.roc_auc_score(label[own], score[own])
            weight += own.sum()
    result = gauc([f"user {g}" for g in group], label, score)
    assert math.isnan(result) if not weight else result == pytest.approx(total / weight, abs=1e-12)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1, width=32)), min_size=1, max_size=50))
def test_log_loss_equals_scikit_learn(sk: Any, rows: list[tuple[int, float]]) -> None:
    label, probability = (np.array(column) for column in zip(*rows, strict=True))
    assert log_loss(label, probability) == pytest.approx(sk.log_loss(label, probability, labels=[0, 1]), rel=1e-9)
    single = probability.astype(np.float32)
    # A float32 probability of exactly 0 or 1 is clipped by the resolution of float32, not of float64.
    assert log_loss(label, single) <= -math.log(np.finfo(np.float32).eps) + 1e-6


def test_normalized_entropy_by_hand() -> None:
    label = np.array([1, 0, 0, 0])
    assert normalized_entropy(label, np.full(4, 0.25)) == pytest.approx(1.0, abs=1e-12)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    loss = -(math.log(0.7) + 3 * math.log(0.9)) / 4
    assert normalized_entropy(label, np.array([0.7, 0.1, 0.1, 0.1])) == pytest.approx(loss / entropy, rel=1e-12)
    assert math.isnan(normalized_entropy([1, 1], [0.5, 0.9]))


def test_calibration_by_hand() -> None:
    result = calibration([0, 1, 1, 1], [0.2, 0.2, 0.6, 0.8], num_bins=2)
    assert result.ratio == pytest.approx(0.45 / 0.75)
    np.testing.assert_allclose(result.bin_predictions, [0.2, 0.7])
    np.testing.assert_allclose(result.bin_labels, [0.5, 1.0])
    assert result.bin_counts.tolist() == [2, 2]
    assert result.expected_error == pytest.approx((2 * 0.3 + 2 * 0.3) / 4)


def test_calibration_bins_equal_scikit_learn() -> None:
    from sklearn.calibration import calibration_curve

    rng = np.random.default_rng(0)
    probability = rng.random(1000) ** 4
    label = (rng.random(1000) < probability).astype(int)
    expected_label, expected_prediction = calibration_curve(label, probability, n_bins=10, strategy="quantile")
    result = calibration(label, probability, num_bins=10)
    np.testing.assert_allclose(result.bin_labels, expected_label, atol=0.02)
    np.testing.assert_allclose(result.bin_predictions, expected_prediction, atol=0.01)
    assert result.bin_counts.tolist() == [100] * 10


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.5, 1.0])), min_size=1, max_size=50))
def test_calibration_does_not_depend_on_row_order(rows: list[tuple[int, float]]) -> None:
    label, probability = (np.array(column) for column in zip(*rows, strict=True))
    forward, backward = calibration(label, probability, 4), calibration(label[::-1], probability[::-1], 4)
    assert forward.expected_error == pytest.approx(backward.expected_error, abs=1e-12)
    assert forward.bin_counts.sum() == len(rows)
    # |mean prediction - mean label| can only grow if it is computed per bin.
    assert forward.expected_error >= abs(probability.mean() - label.mean()) - 1e-12


def test_hit_rate_and_ndcg_by_hand() -> None:
    ranks = np.array([0, 1, 9, 10])
    gain = pytest.approx((1 + 1 / math.log2(3) + 1 / math.log2(11)) / 4)
    assert ranking_metrics(ranks, [10, 1]) == {"hr@10": 0.75, "ndcg@10": gain, "hr@1": 0.25, "ndcg@1": 0.25}
    assert all(map(math.isnan, ranking_metrics(ranks[:0], [10]).values()))


def test_ndcg_equals_scikit_learn(sk: Any) -> None:
    rng = np.random.default_rng(1)
    scores, target = rng.normal(size=(30, 40)), rng.integers(0, 40, 30)
    relevance = np.zeros_like(scores)
    relevance[np.arange(30), target] = 1
    measured = ranking_metrics(ranks_of_targets(scores, target), [5])
    assert measured["ndcg@5"] == pytest.approx(sk.ndcg_score(relevance, scores, k=5), abs=1e-12)
    assert measured["hr@5"] == sk.top_k_accuracy_score(target, scores, k=5, labels=np.arange(40))


def slow_ranks(scores: NDArray[np.float64], target: list[int], excluded: list[list[int]]) -> list[int]:
    result = []
    for row, own, seen in zip(scores, target, excluded, strict=True):
        baselines = [score for item, score in enumerate(row) if item != own and item not in seen]
        result.append(sum(r > row[own] for r in baselines) + math.ceil(sum(r == row[own] for r in baselines) / 2))
    return result


@settings(deadline=None)
@given(st.data())
def test_ranks_equal_a_plain_loop_for_any_chunk_size(data: st.DataObject) -> None:
    num_rows, num_items = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 8))
    item = st.integers(0, num_items - 1)
    cells = st.lists(st.integers(-2, 2), min_size=num_rows * num_items, max_size=num_rows * num_items)
    scores = np.array(data.draw(cells), dtype=np.float64).reshape(num_rows, num_items)
    target = data.draw(st.lists(item, min_size=num_rows, max_size=num_rows))
    excluded = data.draw(st.lists(st.lists(item, max_size=10), min_size=num_rows, max_size=num_rows))
    packed = np.array([i for seen in excluded for i in seen], np.int64), np.cumsum([0, *map(len, excluded)])
    expected = slow_ranks(scores, target, excluded)
    original = scores.copy()
    size = data.draw(st.sampled_from([1, 2 * num_items, 1 << 20]))
    assert ranks_of_targets(scores, np.array(target, np.int64), packed, scores_per_chunk=size).tolist() == expected
    np.testing.assert_array_equal(scores, original)


BAD = [
    (lambda: auc([0, 1], [math.nan, 1.0]), "scores: row 0 is NaN"),
    (lambda: auc([0, 2], [0.0, 1.0]), "labels: row 1 is 2"),
    (lambda: auc([0, 1, 1], [0.0, 1.0]), "scores: has shape"),
    (lambda: gauc([1], [0, 1], [0.0, 1.0]), "groups: has shape"),
    (lambda: log_loss([0, 1], [0.5, 1.5]), "probabilities: row 1 is 1.5"),
    (lambda: calibration([0, 1], [0.5, 0.5], 0), "num_bins"),
    (lambda: ranks_of_targets(np.array([[1.0, 2.0], [math.nan, 1.0]]), np.zeros(2, np.int64)), "row 1 holds NaN"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused_by_name(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()
