"""The commands `vista log …`: from a config to a report."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vista.config_data import LogStatsConfig
from vista.data.event_log import EventLog


@dataclass(frozen=True, slots=True)
class LogStats:
    """What a log holds.

    segments: names, oldest first; first and last time: ms, None in an empty log or one without times; size_bytes: of
    all files in the segments in force.
    """

    path: Path
    segments: list[str]
    num_users: int
    num_items: int
    num_events: int
    num_impressions: int
    size_bytes: int
    first_ms: int | None
    last_ms: int | None

    def __str__(self) -> str:
        times = "order only"
        if self.first_ms is not None and self.last_ms is not None:
            times = " to ".join(
                datetime.fromtimestamp(ms / 1000, UTC).isoformat(" ", "seconds").removesuffix("+00:00")
                for ms in (self.first_ms, self.last_ms)
            )
        return "\n".join(
            [
                f"{self.path}: {len(self.segments)} segment(s), {self.size_bytes:,} bytes: {', '.join(self.segments)}",
                f"{self.num_users:,} users, {self.num_items:,} items, {self.num_events:,} events ({times}), "
                f"{self.num_impressions:,} impressions",
            ]
        )


def log_stats(config: LogStatsConfig) -> LogStats:
    """What the log holds.

    Raises:
        LogFormatError: if it is missing or damaged.
    """
    log = EventLog.open(config.data)
    impressions = log.impressions
    first, last = (log.time_range() if log.has_time else None) or (None, None)
    return LogStats(
        log.path,
        [segment.path.name for segment in log.segments],
        log.num_users,
        log.num_items,
        log.num_events,
        impressions.num_impressions if impressions is not None else 0,
        sum(file.stat().st_size for segment in log.segments for file in segment.path.rglob("*") if file.is_file()),
        first,
        last,
    )
