"""What a refresh says of itself: progress, one JSON line a batch, and a report at the end."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from vista.errors import RecordError
from vista.store.lmdb.permissions import PRIVATE

logger = logging.getLogger(__name__)
STAGES = ("read", "summarize", "encode", "write", "publish")
MAX_FAILED_SHARE, MAX_FAILED_USERS = 0.01, 10
"""With more failures than both a run stops, as it does if all fail; what is served stays."""
NAMED_FAILURES = 20
"""Users that a report names at most."""


@dataclass(frozen=True, slots=True)
class RefreshReport:
    """What a refresh did. `shares` are the stages' parts of the time, which add up to 1."""

    store: str
    generation: int
    num_users: int
    """Users that the run is about: all with events, or those with changes."""
    resumed_at: int
    """Users among them that an earlier, interrupted run had written."""
    num_events: int
    """Events that were summarized in this run."""
    seconds: float
    shares: dict[str, float]
    counts: dict[str, int] = field(default_factory=dict)
    """Users by what became of them: written, appended, exchanged, recomputed, removed, erased, unchanged, failed."""
    failures: dict[str, str] = field(default_factory=dict)
    """Some of the users that failed, and why; their old records, if any, stay."""

    def __str__(self) -> str:
        done = self.num_users - self.resumed_at
        stages = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        resumed = f" ({self.resumed_at} of them by an earlier run)" if self.resumed_at else ""
        counts = "".join(f"; {number} {what}" for what, number in self.counts.items() if number)
        failed = "".join(f"\nuser {user} failed: {reason}" for user, reason in self.failures.items())
        return (
            f"generation {self.generation} of {self.store}: {self.num_users} users{resumed}, {self.num_events} events "
            f"in {self.seconds:.1f} s: {done / max(self.seconds, 1e-9):,.0f} users/s ({stages}){counts}{failed}"
        )


class RefreshProgress:
    """Seconds a stage, users by outcome, a progress bar and `<store>/refresh.jsonl`: what a run was and did."""

    def __init__(self, store: str | Path, kind: str, total: int, done: int, *, progress: bool) -> None:
        self._path = Path(store) / "refresh.jsonl"
        self._kind, self._total = kind, total
        self._began = time.perf_counter()
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._stage, self._entered = "", 0.0
        self._bar = tqdm(total=total, initial=done, desc="refresh", unit="user", disable=not progress)
        self._done, self._resumed_at, self.num_events = done, done, 0
        self.counts: Counter[str] = Counter()
        self.failures: dict[str, str] = {}

    def stage(self, name: str) -> RefreshProgress:
        """Context whose time counts for a stage."""
        self._stage = name
        return self

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seconds[self._stage] += time.perf_counter() - self._entered

    def failed(self, user: object, reason: str) -> None:
        """One user could not be refreshed."""
        self.counts["failed"] += 1
        if len(self.failures) < NAMED_FAILURES:
            self.failures[str(user)] = reason

    def check_failures(self) -> None:
        """Stop a run that fails more than a few users: then it is no user's events but the model or the code.

        Raises:
            RecordError: with the first failure's reason.
        """
        failed = self.counts["failed"]
        if failed == self._total > 0 or failed > max(MAX_FAILED_USERS, MAX_FAILED_SHARE * self._total):
            user, reason = next(iter(self.failures.items()))
            raise RecordError(f"{self.counts['failed']} users failed, the first of them {user!r}: {reason}")

    def batch(self, generation: int, num_users: int, num_events: int) -> None:
        """A batch is durable."""
        self._done += num_users
        self.num_events += num_events
        self._bar.update(num_users)
        seconds = time.perf_counter() - self._began
        rate = (self._done - self._resumed_at) / max(seconds, 1e-9)
        line = {
            "time_ms": time.time_ns() // 1_000_000,
            "kind": self._kind,
            "generation": generation,
            "users": self._done,
            "of": self._total,
            "events": self.num_events,
            "seconds": round(seconds, 3),
            "users_per_s": round(rate, 1),
            "seconds_left": round((self._total - self._done) / max(rate, 1e-9), 1),
            "stages": {name: round(value, 3) for name, value in self._seconds.items()},
        }
        try:
            with open(self._path, "a", opener=_private) as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # The batch is durable all the same.
            logger.warning("%s: %s", self._path, error.strerror)

    def report(self, store: str | Path, generation: int) -> RefreshReport:
        """The end of the run."""
        self._bar.close()
        seconds = time.perf_counter() - self._began
        shares = {stage: value / max(seconds, 1e-9) for stage, value in self._seconds.items()}
        shares["other"] = 1 - sum(shares.values())
        return RefreshReport(
            str(store),
            generation,
            self._total,
            self._resumed_at,
            self.num_events,
            seconds,
            shares,
            dict(self.counts),
            self.failures,
        )


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, PRIVATE.file)
