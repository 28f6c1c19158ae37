"""Whether a store covers its log."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum

from vista.explore.user_page import shown_age
from vista.log.event_log import EventLog
from vista.log.until import Until, parse_until
from vista.store.manifest import Manifest


class Freshness(Enum):
    """How a store relates to its log."""

    fresh = "Fresh"
    partial = "Held back"
    behind = "Behind the log"
    unknown = "Unknown"


@dataclass(frozen=True, slots=True)
class StoreFreshness:
    """Whether a store covers its log, and why."""

    state: Freshness
    reason: str


def store_freshness(manifest: Manifest, log: EventLog | None, now_ms: int | None = None) -> StoreFreshness:
    """Compare a store with the log that it was refreshed from.

    Args:
        manifest: of the served generation.
        log: None if it is not open.
        now_ms: the current time, ms; None asks the clock.
    """
    now = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    age = f"The last refresh started {shown_age(now - max(manifest.refreshed_at, manifest.created_at))} ago"
    if log is None:
        return StoreFreshness(Freshness.unknown, f"{age}. Without the log, newer events are unknown.")
    if manifest.applied_segment < log.last_segment:
        count = log.last_segment - manifest.applied_segment
        num_changed = len(log.changed_users(manifest.applied_segment))
        changed = f"{num_changed:,} user{'s' * (num_changed != 1)}"
        segments = f"{count} newer segment{'s' * (count != 1)}"
        return StoreFreshness(
            Freshness.behind,
            f"{age}. The log has {segments} with changes of {changed}; run `vista refresh ... incremental=true`.",
        )
    if parse_until(manifest.until) != Until():
        return StoreFreshness(
            Freshness.partial, f"{age} and covered all segments, but only events until={manifest.until}, as requested."
        )
    return StoreFreshness(Freshness.fresh, f"{age}, and it covers every segment of the log.")
