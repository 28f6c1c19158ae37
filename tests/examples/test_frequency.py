"""Item frequencies: exact counts against a plain loop, and the count-min sketch against its bounds."""

from __future__ import annotations

import logging
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vista.config import DataConfig, ModelConfig, SourceColumns, TrainConfig
from vista.errors import MissingDependencyError
from vista.examples.batch_source import BatchSource
from vista.examples.frequency import item_counts, sketched_item_counts
from vista.log.event_log import EventLog

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


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.sampled_from([0.003, 0.03, 0.3]), st.sampled_from([0.3, 0.9, 0.99]))
def test_an_estimate_is_never_too_small_and_seldom_beyond_its_bound(
    log: EventLog, seed: int, relative_error: float, confidence: float
) -> None:
    counts = some_counts(log, seed)
    exact = item_counts(log, counts)
    excess = sketched_item_counts(log, counts, relative_error=relative_error, confidence=confidence) - exact
    assert (excess >= 0).all()
    beyond = (excess > relative_error * exact.sum()).mean()
    # Markov's bound is far from tight. That so few counters err at all shows that the sketch is used.
    assert beyond <= 1 - confidence
    assert excess.any()


def test_blocks_do_not_change_the_estimates(log: EventLog) -> None:
    one_block, many_blocks = (
        sketched_item_counts(log, relative_error=0.01, confidence=0.9, block_events=count) for count in (1 << 22, 700)
    )
    np.testing.assert_array_equal(many_blocks, one_block)


def test_the_default_size_is_exact_for_a_small_log_and_is_logged(
    log: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "vista.examples.frequency"):
        estimates = sketched_item_counts(log)
    np.testing.assert_array_equal(estimates, item_counts(log))
    (line,) = caplog.messages
    assert "32000 events, 7 x 271829 counters (15.2 MB)" in line
    assert "with 99.9 % confidence at most 0.3 events too large" in line


def source(log: EventLog, frequencies: str) -> BatchSource:
    config = TrainConfig(
        model=ModelConfig(dim=8, num_heads=2, tail_len=4),
        data=DataConfig(
            tokens_per_batch=512,
            label_spacing=4,
            num_negatives=50,
            negative_power=1.0,
            frequencies=frequencies,  # type: ignore[arg-type]
        ),
    )
    return BatchSource(log, np.arange(log.num_items) + 1, config)


def test_batches_from_a_sketch_are_reproducible(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run draws the same negatives."""
    coarse = partial(sketched_item_counts, relative_error=0.05, confidence=0.9)
    monkeypatch.setattr("vista.examples.frequency.sketched_item_counts", coarse)
    first, resumed, exact = source(log, "count_min"), source(log, "count_min"), source(log, "exact")
    for _ in range(3):
        first.batch(0, 0)
    one, other, plain = first.batch(1, 2), resumed.batch(1, 2), exact.batch(1, 2)
    for name, tensor in one.tensors().items():
        assert tensor.equal(other.tensors()[name]), name
    assert not one.negatives.log_weight.equal(plain.negatives.log_weight), "negatives are drawn by the estimates"


def test_a_missing_package_is_named(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketches", None)
    source(log, "exact")
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[sketches\]'; or set data\.freq"):
        source(log, "count_min")
