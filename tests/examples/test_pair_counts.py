"""Pairs of items that lie close together: against a loop, in blocks, and of some users of a large log."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from tests.examples.test_item_factors import NUM_ITEMS, log_of, pairs_of, visible
from vista.examples import pair_counts as module
from vista.examples.pair_counts import PairCounts, pair_counts
from vista.log.event_log import EventLog


def counted(log: EventLog, *, most_events: int = 1 << 20, seed: int = 1) -> PairCounts:
    rng = np.random.default_rng(seed)
    return pair_counts(log, np.arange(NUM_ITEMS) + 1, visible(log), most_events=most_events, rng=rng)


@pytest.mark.parametrize("block", [1, 70, 1 << 20])
def test_pairs_equal_a_loop_for_any_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    log = log_of(tmp_path / "log")
    monkeypatch.setattr(module, "BLOCK_EVENTS", block)
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
