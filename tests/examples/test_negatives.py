"""What batches draw: item frequencies, and unbiased negatives."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from vista.config import SourceColumns
from vista.examples.batch_source import NegativeSampler
from vista.examples.item_statistics import item_counts
from vista.log.event_log import EventLog

COUNTS = np.array([0, 1, 4, 0, 9, 100, 2, 50, 7, 0, 30], np.int64)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_negatives", [1, 3, 7])
def test_weights_are_unbiased(power: float, num_negatives: int) -> None:
    """The expected weight of each item (0 if it is not drawn) is 1, so the expected sum is the number of items."""
    sampler = NegativeSampler(COUNTS, num_negatives=num_negatives, power=power)
    rng = np.random.default_rng(0)
    passes = 3000
    total, squares = np.zeros(len(COUNTS)), np.zeros(len(COUNTS))
    for _ in range(passes):
        items, log_weight = sampler.draw(rng)
        weight = np.zeros(len(COUNTS))
        weight[items] = np.exp(log_weight.astype(np.float64))
        total += weight
        squares += weight**2
    mean = total / passes
    error = np.sqrt(np.maximum(squares / passes - mean**2, 0) / passes)
    occurring = COUNTS > 0
    assert not mean[~occurring].any(), "items that never occur are never drawn"
    assert (np.abs(mean - 1)[occurring] < 5 * error[occurring] + 1e-6).all()


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_draws_are_distinct_sorted_and_limited_in_number(power: float) -> None:
    sampler = NegativeSampler(np.arange(2000), num_negatives=300, power=power)
    for seed in range(20):
        items, log_weight = sampler.draw(np.random.default_rng(seed))
        assert items.dtype == np.int64 and log_weight.dtype == np.float32
        assert (np.diff(items) > 0).all() and items[0] > 0
        assert len(items) == len(log_weight) and len(items) <= 300
        assert power or len(items) == 300


def test_power_draws_in_proportion_to_frequency() -> None:
    sampler = NegativeSampler(COUNTS, num_negatives=1, power=1.0)
    rng = np.random.default_rng(1)
    drawn = np.bincount([sampler.draw(rng)[0][0] for _ in range(6000)], minlength=len(COUNTS))
    expected = COUNTS / COUNTS.sum()
    assert np.abs(drawn / 6000 - expected).max() < 5 * np.sqrt(0.25 / 6000)


@pytest.mark.parametrize("power", [0.0, 0.7])
@pytest.mark.parametrize("num_negatives", [8, 1000])
def test_enough_negatives_include_every_item_once(power: float, num_negatives: int) -> None:
    sampler = NegativeSampler(COUNTS, num_negatives=num_negatives, power=power)
    items, log_weight = sampler.draw(np.random.default_rng(0))
    np.testing.assert_array_equal(items, np.flatnonzero(COUNTS))
    assert not log_weight.any()


def test_a_log_without_items_is_refused() -> None:
    with pytest.raises(ValueError, match="no item occurs in training"):
        NegativeSampler(np.zeros(4, np.int64), num_negatives=2, power=0.0)


NUM_ITEMS = 2000


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """300 users with Zipf-distributed items; the first user has them all, so that row r is item r."""
    rng = np.random.default_rng(0)
    items = np.concatenate([np.arange(NUM_ITEMS), rng.zipf(1.2, 30_000) % NUM_ITEMS])
    users = np.concatenate([np.zeros(NUM_ITEMS, np.int64), rng.integers(1, 300, 30_000)])
    folder = tmp_path_factory.mktemp("frequency") / "log"
    return EventLog.from_frame({"user": users, "item": items}, folder, columns=SourceColumns(timestamp=None))


def some_counts(log: EventLog, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, log.lengths + 1)


@pytest.mark.parametrize("block_events", [1, 5000, 1 << 22])
def test_exact_counts_equal_a_plain_loop(log: EventLog, block_events: int) -> None:
    counts = some_counts(log, 1)
    expected = np.zeros(NUM_ITEMS, np.int64)
    for row in range(log.num_users):
        np.add.at(expected, log.slice(row, 0, counts[row]).item, 1)
    np.testing.assert_array_equal(item_counts(log, counts, block_events=block_events), expected)
