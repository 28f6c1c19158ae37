"""The commands `vista simulate` and `vista log ...`: config to report."""

from __future__ import annotations

from vista.config import (
    LogCompactConfig,
    LogEraseConfig,
    LogForgetConfig,
    LogStatsConfig,
    LogVerifyConfig,
    SimulateConfig,
)
from vista.errors import LogFormatError
from vista.log.compaction import CompactionReport, compact_log
from vista.log.deletions import DeletionReport, erase_users, forget_file
from vista.log.event_log import EventLog
from vista.log.log_stats import LogStats
from vista.log.log_verification import LogVerification, verify_log
from vista.log.vocabulary import ids_of_words
from vista.simulation.simulate import simulate
from vista.simulation.simulation_report import SimulationReport


def run_simulate(config: SimulateConfig) -> SimulationReport:
    """`vista simulate`; errors as of `simulate`."""
    return simulate(config)


def run_log_forget(config: LogForgetConfig) -> DeletionReport:
    """`vista log forget`; errors as of `forget_file`."""
    return forget_file(config.data, config.events, config.time_unit)


def run_log_erase(config: LogEraseConfig) -> DeletionReport:
    """`vista log erase`; errors as of `erase_users`.

    Raises:
        ConfigError: if no user is named, or an id is text but the log's ids are integers.
    """
    users = ids_of_words(config.users, "users", EventLog.open(config.data).users.kind)
    return erase_users(config.data, users)


def run_log_compact(config: LogCompactConfig) -> CompactionReport:
    """`vista log compact`; errors as of `compact_log`."""
    return compact_log(config.data)


def run_log_verify(config: LogVerifyConfig) -> LogVerification:
    """`vista log verify`.

    Raises:
        LogFormatError: naming every damaged file.
    """
    report = verify_log(config.data)
    if report.damaged:
        raise LogFormatError(str(report))
    return report


def run_log_stats(config: LogStatsConfig) -> LogStats:
    """`vista log stats`.

    Raises:
        LogFormatError: if it is missing or damaged.
    """
    log = EventLog.open(config.data)
    log.verify(newer_than=log.last_segment)
    return LogStats.of(log)
