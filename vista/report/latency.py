"""How long the scorer takes, measured repeatedly while the spread is wide, with the load of the machine."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vista.machine import usable_cores
from vista.progress_bar import progress_bar
from vista.scorer import CandidateSet, Scorer

MIN_ROUNDS, MAX_ROUNDS = 3, 9
REQUESTS_PER_ROUND = 30
"""Requests per user and round."""
WIDE_SPREAD = 1.5
"""A round in which the 90th percentile of a user exceeds this multiple of the median is repeated."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Times of requests for U users with histories of different lengths."""

    lengths: list[int]
    """Events in each user's history."""
    num_candidates: int
    median_s: list[float]
    """Median over the rounds of each round's median, by user."""
    p90_s: list[float]
    """Median over the rounds of each round's 90th percentile, by user."""
    num_rounds: int
    is_wide: bool
    """Whether the spread was still wide in at least half of the rounds."""
    load: tuple[float, float]
    """Load average over one minute, before and after; NaN where the system has none."""
    num_cores: int
    num_threads: int

    @classmethod
    def measure(
        cls, scorer: Scorer, users: Sequence[int | str], lengths: Sequence[int], candidates: CandidateSet, now: int
    ) -> Latency:
        """Score the candidates for one user at a time, in turns, so that a disturbance affects all users equally.

        A round is repeated while most of the rounds so far had a wide spread, up to MAX_ROUNDS.

        Args:
            users: U ids of users in the scorer's store.
            lengths: events in their histories.
            candidates: the same for all users.
            now: time of the requests, ms.
        """
        before = _load()
        _time_round(scorer, users, candidates, now, 5)  # fills caches
        rounds: list[NDArray[np.float64]] = []
        with progress_bar(desc="latency", unit="round", leave=False) as bar:
            while len(rounds) < MIN_ROUNDS or (len(rounds) < MAX_ROUNDS and _is_wide(rounds)):
                rounds.append(_time_round(scorer, users, candidates, now, REQUESTS_PER_ROUND))
                bar.update()
        return cls(
            list(lengths),
            candidates.rows.shape[-1],
            np.median([np.median(each, axis=0) for each in rounds], axis=0).tolist(),
            np.median([np.percentile(each, 90, axis=0) for each in rounds], axis=0).tolist(),
            len(rounds),
            _is_wide(rounds),
            (before, _load()),
            usable_cores(),
            torch.get_num_threads(),
        )


def _time_round(
    scorer: Scorer, users: Sequence[int | str], candidates: CandidateSet, now: int, num_requests: int
) -> NDArray[np.float64]:
    """Seconds of each request: float64 [num_requests, U]."""
    times = np.zeros((num_requests, len(users)))
    for turn in range(num_requests):
        for index, user in enumerate(users):
            began = time.perf_counter()
            scorer.score([user], candidates, now=now)
            times[turn, index] = time.perf_counter() - began
    return times


def _is_wide(rounds: Sequence[NDArray[np.float64]]) -> bool:
    wide = [bool((np.percentile(each, 90, axis=0) > WIDE_SPREAD * np.median(each, axis=0)).any()) for each in rounds]
    return 2 * sum(wide) >= len(wide)


def _load() -> float:
    """Average number of runnable processes over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
