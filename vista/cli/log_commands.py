"""The commands that make and change logs, `vista simulate`, `vista prepare`, and `vista log ...`: config to report."""

from __future__ import annotations

from vista.config import LogCompactConfig, LogEraseConfig, LogForgetConfig, LogStatsConfig
from vista.log.compaction import CompactionReport, compact_log
from vista.log.deletions import DeletionReport, erase_users, forget_file
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.log.log_stats import LogStats
from vista.log.vocabulary import ids_of_words
from vista.simulation.simulate import simulate

__all__ = ["log_compact", "log_erase", "log_forget", "log_stats", "prepare", "simulate"]


def log_forget(config: LogForgetConfig) -> DeletionReport:
    """Delete the events that a file names. Raises what `forget_file` raises."""
    return forget_file(config.data, config.events, config.time_unit)


def log_erase(config: LogEraseConfig) -> DeletionReport:
    """Delete users. Raises what `erase_users` raises.

    Raises:
        ConfigError: if no user is named, or an id is text but the log's ids are integers.
    """
    users = ids_of_words(config.users, "users", EventLog.open(config.data).users.kind)
    return erase_users(config.data, users)


def log_compact(config: LogCompactConfig) -> CompactionReport:
    """Merge all segments into one. Raises what `compact_log` raises."""
    return compact_log(config.data)


def log_stats(config: LogStatsConfig) -> LogStats:
    """What the log contains.

    Raises:
        LogFormatError: if it is missing or damaged.
    """
    return LogStats.of(EventLog.open(config.data))
