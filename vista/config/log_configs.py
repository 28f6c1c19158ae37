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
    """CSV or Parquet file with the columns user, item, timestamp and, if wanted, action; each row names an event."""
    time_unit: str | None = None
    """s | ms | us | ns | iso, of its timestamps; null in a log without times, where they count events from 0."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class LogEraseConfig:
    """Deletion of users from an EventLog."""

    data: str = "data/log"
    """Folder of the EventLog."""
    users: list[str] = field(default_factory=list)
    """User ids; at least one."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class LogCompactConfig:
    """Compaction of an EventLog's segments into one, without what was deleted."""

    data: str = "data/log"
    """Folder of the EventLog."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class LogStatsConfig:
    """What an EventLog holds."""

    data: str = "data/log"
    """Folder of the EventLog."""

    def __post_init__(self) -> None:
        check_types(self)
