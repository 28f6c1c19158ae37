"""Progress of a running refresh: a progress bar, one JSON line per batch, and the numbers of the final report."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from pathlib import Path

from vista.errors import RecordError
from vista.progress_bar import progress_bar
from vista.refresh.refresh_report import RefreshReport
from vista.refresh.stage_clock import StageClock
from vista.refresh.user_records import UserRecords
from vista.store.lmdb.permissions import open_private
from vista.store.remote.store_url import StoreUrl

logger = logging.getLogger(__name__)
MAX_FAILED_SHARE, MAX_FAILED_USERS = 0.01, 10
"""A run stops if more users fail than both limits allow, or if all of them fail."""
NAMED_FAILURES = 20
"""A report names at most this many failed users."""


class RefreshProgress(StageClock):
    """Seconds per stage, users by outcome, a progress bar, and `<store>/refresh.jsonl`, which keeps every run's log.

    Args:
        store: the store's folder. Of a store on a server, given by its URL, no log is kept.
        kind: kind of the refresh in the log: full, incremental or merge.
        total: how many users the run covers.
        done: how many of them an earlier, interrupted run had written.
        progress: show the bar.
    """

    def __init__(self, store: Path | StoreUrl, kind: str, total: int, done: int, *, progress: bool) -> None:
        super().__init__()
        self._store = store
        self._kind, self._total = kind, total
        self._began = time.perf_counter()
        self._bar = progress_bar(total=total, initial=done, desc="refresh", unit="user", shown=progress)
        self._done, self._resumed_at, self.num_events = done, done, 0
        self.counts: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self._num_records = self._num_bytes = 0

    def encoded(self, records: UserRecords) -> None:
        """Count the sizes of records, and the users that failed.

        Raises:
            RecordError: too many users failed, so the cause is the model or the code, not their events. The message has
                the first one's reason.
        """
        self._num_records += len(records.records)
        self._num_bytes += sum(map(len, records.records))
        for user, reason in records.failures.items():
            self.counts["failed"] += 1
            if len(self.failures) < NAMED_FAILURES:
                self.failures[user] = reason
        failed = self.counts["failed"]
        if failed == self._total > 0 or failed > max(MAX_FAILED_USERS, MAX_FAILED_SHARE * self._total):
            user, reason = next(iter(self.failures.items()))
            raise RecordError(f"{failed} users failed; the first one is {user!r}: {reason}")

    def batch(self, generation: int, num_users: int, num_events: int) -> None:
        """Record that a batch is durable."""
        self._done += num_users
        self.num_events += num_events
        self._bar.update(num_users)
        seconds = time.perf_counter() - self._began
        rate = (self._done - self._resumed_at) / max(seconds, 1e-9)
        if isinstance(self._store, StoreUrl):
            return
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
            "stages": {name: round(value, 3) for name, value in self.seconds.items()},
        }
        path = self._store / "refresh.jsonl"
        try:
            with open(path, "a", opener=lambda _, flags: open_private(path, flags)) as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # The log is optional: the batch is durable without it.
            logger.warning("%s: %s", path, error.strerror)

    def report(self, generation: int) -> RefreshReport:
        """End the run."""
        self._bar.close()
        seconds = time.perf_counter() - self._began
        shares = {stage: value / max(seconds, 1e-9) for stage, value in self.seconds.items()}
        shares["other"] = 1 - sum(shares.values())
        return RefreshReport(
            str(self._store),
            generation,
            self._total,
            self._resumed_at,
            self.num_events,
            seconds,
            shares,
            dict(self.counts),
            self.failures,
            self._num_bytes / max(self._num_records, 1),
        )
