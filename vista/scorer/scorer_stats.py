"""Counters of a scorer: users found, candidates unknown, duration of calls. A forked child has counters of its own."""

from __future__ import annotations

import bisect
import math
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol


class Forkable(Protocol):
    """An object that holds what does not survive a fork, such as a lock or a thread."""

    def _after_fork(self) -> None:
        """Make the copy in a forked child usable."""


_registered: weakref.WeakSet[Forkable] = weakref.WeakSet()


def repair_after_fork(held: Forkable) -> None:
    """Call `held._after_fork()` in every child that is forked during the object's life."""
    _registered.add(held)


def _repair() -> None:
    for held in _registered:
        held._after_fork()


os.register_at_fork(after_in_child=_repair)


BUCKETS_PER_OCTAVE = 4
LATENCY_BOUNDS_MS = tuple(0.0625 * 2 ** (step / BUCKETS_PER_OCTAVE) for step in range(20 * BUCKETS_PER_OCTAVE + 1))
"""Upper bounds of the histogram's buckets, 62.5 µs to 65 s, each 19 % above the one before; the last bucket is open."""


@dataclass(frozen=True, slots=True)
class ScorerStats:
    """What a scorer has done in this process since it was opened (or since the process was forked)."""

    calls: int = 0
    failed_calls: int = 0
    """Calls that raised an error."""
    hits: int = 0
    """Users whose record was used; a user counts once per call."""
    misses: int = 0
    """Users without a record."""
    stale: int = 0
    """Users whose record was older than max_age_s and therefore not used."""
    damaged: int = 0
    """Users whose record is damaged. With on_missing="nan" they get NaN, otherwise the call fails."""
    bad_users: int = 0
    """With on_missing="nan": users who got NaN, because their record is damaged or their tail or time is impossible."""
    candidates: int = 0
    """Pairs of a user and a candidate."""
    unknown_candidates: int = 0
    """Pairs whose item the model does not know."""
    dropped: int = 0
    """Candidates that `rank` left out because they were unknown or their score was not finite."""
    reloads: int = 0
    """Calls of `reload` that moved to another generation or model."""
    failed_reloads: int = 0
    """Calls of `reload` that raised an error."""
    last_reload_error: str | None = None
    """Error of the last call of `reload`; None if that call succeeded."""
    followed_at: int = 0
    """When `reload` last succeeded, ms since 1970; 0 if never."""
    latency_counts: tuple[int, ...] = field(default=(0,) * (len(LATENCY_BOUNDS_MS) + 1))
    """Calls by duration, including failed ones; bucket i ends at LATENCY_BOUNDS_MS[i], the last one is open."""

    def latency_ms(self, quantile: float) -> float:
        """Quantile of the duration of calls, rounded up to its bucket's bound; NaN without calls.

        Args:
            quantile: in (0, 1]; 0.99 gives the p99.

        Raises:
            ValueError: the quantile is not in (0, 1].
        """
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile: must lie in (0, 1], got {quantile}")
        total, seen = sum(self.latency_counts), 0
        for bound, count in zip((*LATENCY_BOUNDS_MS, math.inf), self.latency_counts, strict=True):
            seen += count
            if total and seen >= quantile * total:
                return bound
        return math.nan


COUNTERS = tuple(
    name
    for name in ScorerStats.__dataclass_fields__
    if name not in ("last_reload_error", "followed_at", "latency_counts")
)


class StatsRecorder:
    """Counts for all threads of a process. A forked child starts at zero."""

    def __init__(self) -> None:
        self._after_fork()
        repair_after_fork(self)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._latencies = [0] * (len(LATENCY_BOUNDS_MS) + 1)
        self._reload_error: str | None = None
        self._followed_at = 0

    def add(self, **counts: int) -> None:
        """Add to counters by name."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count and time the call that a block makes."""
        began, failed = time.perf_counter(), True
        try:
            yield
            failed = False
        finally:
            self.called(time.perf_counter() - began, failed=failed)

    def called(self, seconds: float, *, failed: bool) -> None:
        """Count a call."""
        bucket = bisect.bisect_left(LATENCY_BOUNDS_MS, 1e3 * seconds)
        with self._lock:
            self._counts["calls"] += 1
            self._counts["failed_calls"] += failed
            self._latencies[bucket] += 1

    def reloaded(self, *, moved: bool) -> None:
        """Count a call of `reload` that succeeded."""
        with self._lock:
            self._counts["reloads"] += moved
            self._reload_error, self._followed_at = None, time.time_ns() // 1_000_000

    def failed_to_reload(self, error: BaseException) -> None:
        """Count a call of `reload` that raised an error."""
        with self._lock:
            self._counts["failed_reloads"] += 1
            self._reload_error = f"{type(error).__name__}: {error}"

    def snapshot(self) -> ScorerStats:
        """All numbers at one point in time."""
        with self._lock:
            return ScorerStats(
                **self._counts,
                last_reload_error=self._reload_error,
                followed_at=self._followed_at,
                latency_counts=tuple(self._latencies),
            )
