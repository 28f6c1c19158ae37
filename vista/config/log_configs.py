"""Configurations of the commands `vista log ...`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import check_types


@dataclass(kw_only=True, slots=True)
class LogForgetConfig:
    """Deletion of single events from an EventLog."""

    data: str = "data/log"
    """Folder of the EventLog."""
    events: str = "deletions.csv"
    """CSV or Parquet file with the columns user, item, timestamp, and optionally action. Each row names one event."""
    time_unit: str | None = None
    """Unit of the file's timestamps: s, ms, us, ns, or iso. null for Parquet columns of dates and times, and for a log
    without times, where timestamps are event numbers that start at 0."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class LogEraseConfig:
    """Deletion of users from an EventLog."""

    data: str = "data/log"
    """Folder of the EventLog."""
    users: list[str] = field(default_factory=list)
    """Ids of the users to delete, at least one."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class LogCompactConfig:
    """Compaction of an EventLog's segments into one, without deleted rows."""

    data: str = "data/log"
    """Folder of the EventLog."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class LogVerifyConfig:
    """Check of an EventLog's files."""

    data: str = "data/log"
    """Folder of the EventLog."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class LogStatsConfig:
    """Contents of an EventLog."""

    data: str = "data/log"
    """Folder of the EventLog."""

    def __post_init__(self) -> None:
        check_types(self)
