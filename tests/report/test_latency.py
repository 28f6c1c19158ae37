"""Latency is measured again while its spread is wide. The clock is one that the scorer moves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest

from vista.report.latency import MAX_ROUNDS, MIN_ROUNDS, REQUESTS_PER_ROUND, Latency
from vista.report.latency_section import latency_section
from vista.scorer import CandidateSet, Scorer

CANDIDATES = CandidateSet(np.arange(5), (5, ""))


class TimedScorer:
    """Takes 10 ms per request, and 100 ms for every fourth one of the noisy rounds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, noisy_rounds: int, num_users: int) -> None:
        self.now, self.count, self.noisy_rounds, self.num_users = 0.0, -5 * num_users, noisy_rounds, num_users
        monkeypatch.setattr("vista.report.latency.time.perf_counter", lambda: self.now)

    def score(self, users: list[int], candidates: Any, *, now: int) -> None:
        number = self.count // (REQUESTS_PER_ROUND * self.num_users)
        slow = 0 <= number < self.noisy_rounds and self.count % 4 == 0
        self.now += 0.1 if slow else 0.01
        self.count += 1


def measure(scorer: TimedScorer) -> Latency:
    return Latency.measure(cast(Scorer, scorer), list(range(scorer.num_users)), [10, 1000, 100_000], CANDIDATES, 0)


@pytest.fixture
def scorers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield lambda noisy_rounds: TimedScorer(monkeypatch, noisy_rounds, 3)


def test_a_calm_machine_needs_the_fewest_rounds(scorers: Any) -> None:
    result = measure(scorers(0))
    assert (result.num_rounds, result.is_wide) == (MIN_ROUNDS, False)
    assert result.median_s == pytest.approx([0.01] * 3) and result.p90_s == pytest.approx([0.01] * 3)


def test_noisy_rounds_are_repeated_until_they_are_outvoted(scorers: Any) -> None:
    result = measure(scorers(2))
    assert (result.num_rounds, result.is_wide) == (5, False)
    assert result.p90_s == pytest.approx([0.01] * 3), "the 90th percentile of the noisy rounds was ten times the median"


def test_a_spread_that_stays_wide_is_reported(scorers: Any) -> None:
    result = measure(scorers(100))
    assert (result.num_rounds, result.is_wide) == (MAX_ROUNDS, True)
    page = "\n".join(latency_section(result).body)
    assert "The spread stayed wide" in page and f"on {result.num_cores} cores; load average of the machine" in page
    assert "other processes" not in page, "a load average does not tell what made requests slow"
    assert "spread" not in "\n".join(latency_section(measure(scorers(0))).body)
