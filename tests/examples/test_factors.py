"""Item vectors from factorizations of co-occurrences: values, and what they may read."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.examples.test_item_statistics import visible
from vista.arrays import Int
from vista.examples.item_statistics import REACH, SMOOTHING, PairCounts, item_factors, pair_counts
from vista.log.event_log import EventLog

HIDDEN = 2
"""Newest events of each user that are not visible."""
_EVERY_ITEM = 99
"""A user who had all items, so that all logs have the same vocabulary."""


def grouped_log(
    folder: Path, lengths: Sequence[int], *, num_items: int, group_size: int, offset: int, future: int
) -> EventLog:
    """A log of users with histories of some lengths.

    Args:
        group_size: items of a group; the second one, of odd users, begins at the item `offset`.
        future: changes the newest HIDDEN events of each user.
    """
    rng = np.random.default_rng(3)
    users, items = [], []
    for user, length in enumerate(lengths):
        history = (user % 2) * offset + rng.integers(0, group_size, length)
        history[-HIDDEN:] = (history[-HIDDEN:] + future) % num_items
        users += [user] * length
        items += history.tolist()
    users, items = [*users, *[_EVERY_ITEM] * num_items], [*items, *range(num_items)]
    return EventLog.from_frame(
        {"user": users, "item": items, "timestamp": np.arange(len(users))}, folder, time_unit="s"
    )


NUM_ITEMS = 40


def log_of(folder: Path, *, future: int = 0) -> EventLog:
    half = NUM_ITEMS // 2
    lengths = [3, 30, 1, 25, 60, 45, 80]
    return grouped_log(folder, lengths, num_items=NUM_ITEMS, group_size=half, offset=half, future=future)


def pairs_of(log: EventLog, counts: Int) -> Counter[tuple[int, int]]:
    """Ordered pairs of model rows, by a loop."""
    pairs: Counter[tuple[int, int]] = Counter()
    for user, count in enumerate(counts.tolist()):
        rows = [int(item) + 1 for item in log.slice(user, 0, count).item]
        for place, left in enumerate(rows):
            for right in rows[place + 1 : place + REACH + 1]:
                if left != right:
                    pairs[left, right] += 1
                    pairs[right, left] += 1
    return pairs


def dense_factors(log: EventLog, counts: Int, dim: int) -> tuple[Int, NDArray[np.float64]]:
    """Rows and vectors by the formula in the plan's notation, with a dense SVD."""
    pairs = pairs_of(log, counts)
    rows = np.array(sorted({left for left, _ in pairs}))
    total = {int(row): sum(count for (left, _), count in pairs.items() if left == row) for row in rows}
    context = sum(number**SMOOTHING for number in total.values())
    matrix = np.zeros((len(rows), len(rows)))
    for (left, right), count in pairs.items():
        ratio = count * context / (total[left] * total[right] ** SMOOTHING)
        matrix[np.searchsorted(rows, left), np.searchsorted(rows, right)] = max(0.0, math.log(ratio))
    left_vectors, scale, _ = np.linalg.svd(matrix)
    return rows, (left_vectors * np.sqrt(scale))[:, :dim]


def cosines(vectors: NDArray[np.floating]) -> NDArray[np.float64]:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (unit @ unit.T).astype(np.float64)


@pytest.mark.parametrize(("dim", "tolerance"), [(8, 5e-3), (32, 1e-4)])
def test_vectors_are_those_of_a_dense_svd(tmp_path: Path, dim: int, tolerance: float) -> None:
    """Up to rounding if the sketch has as many columns as there are items, else approximately."""
    log = log_of(tmp_path / "log")
    rows, vectors = item_factors(log, np.arange(NUM_ITEMS) + 1, visible(log), dim, seed=1)
    expected_rows, expected = dense_factors(log, visible(log), dim)
    assert rows.tolist() == expected_rows.tolist() and vectors.dtype == np.float32
    # Signs and rotations of equal singular values are free, so cosines are compared.
    np.testing.assert_allclose(cosines(vectors), cosines(expected), atol=tolerance)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_more_columns_than_items_are_zero(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log")
    rows, vectors = item_factors(log, np.arange(NUM_ITEMS) + 1, visible(log), 64, seed=1)
    assert vectors.shape == (len(rows), 64) and not vectors[:, len(rows) :].any() and vectors[:, :8].any(axis=1).all()


def test_no_vector_depends_on_hidden_events(tmp_path: Path) -> None:
    first, second = (log_of(tmp_path / str(future), future=future) for future in (0, 7))
    rows = np.arange(NUM_ITEMS) + 1
    (known, vectors), (other_known, others) = (
        item_factors(log, rows, visible(log), 8, seed=1) for log in (first, second)
    )
    assert np.array_equal(known, other_known) and np.array_equal(vectors, others)
    assert not np.array_equal(item_factors(first, rows, first.lengths, 8, seed=1)[1][: len(vectors)], vectors)


def counted(log: EventLog, *, most_events: int = 1 << 20, seed: int = 1) -> PairCounts:
    rng = np.random.default_rng(seed)
    return pair_counts(log, np.arange(NUM_ITEMS) + 1, visible(log), most_events=most_events, rng=rng)


@pytest.mark.parametrize("block", [1, 70, 1 << 20])
def test_pairs_equal_a_loop_for_any_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    log = log_of(tmp_path / "log")
    monkeypatch.setattr("vista.examples.item_statistics.BLOCK_EVENTS", block)
    low, high, times = counted(log)
    expected = {pair: count for pair, count in pairs_of(log, visible(log)).items() if pair[0] < pair[1]}
    found = list(zip(low.tolist(), high.tolist(), strict=True))
    assert found == sorted(expected) and times.tolist() == [expected[pair] for pair in found]


def test_pairs_with_row_0_are_not_counted(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log")
    rows = np.where(np.arange(NUM_ITEMS) % 3, np.arange(NUM_ITEMS) + 1, 0)
    low, high, times = pair_counts(log, rows, visible(log), most_events=1 << 20, rng=np.random.default_rng(0))
    known = {
        pair: count
        for pair, count in pairs_of(log, visible(log)).items()
        if pair[0] < pair[1] and (pair[0] - 1) % 3 and (pair[1] - 1) % 3
    }
    assert dict(zip(zip(low.tolist(), high.tolist(), strict=True), times.tolist(), strict=True)) == known


def test_large_logs_count_the_pairs_of_some_users(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = log_of(tmp_path / "log")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        counted(log)
        assert not caplog.messages
        totals = {int(counted(log, most_events=100, seed=seed).times.sum()) for seed in range(6)}
    assert len(totals) > 1 and 0 < min(totals) < max(totals) < sum(pairs_of(log, visible(log)).values()) // 2
    total = visible(log)[visible(log) > 1].sum()
    assert len(caplog.messages) == 6 and f"of {total} events: those of" in caplog.messages[0]
