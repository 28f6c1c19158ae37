"""The simulated period, and the times that split it."""

from __future__ import annotations

from datetime import UTC, datetime

from vista.config import SimulateConfig
from vista.log.histories import DAY_MS

VALIDATION_SHARE, TEST_SHARE = 0.70, 0.85
"""Shares of the period after which validation and test labels begin."""


def period(config: SimulateConfig) -> tuple[int, int]:
    """Start and end of the simulated period, int ms since 1970 (UTC)."""
    first = datetime.fromisoformat(config.start)
    start = round((first if first.tzinfo else first.replace(tzinfo=UTC)).timestamp() * 1000)
    return start, start + round(config.days * DAY_MS)


def split_times(config: SimulateConfig) -> tuple[int, int]:
    """Times (int ms) at which validation and test labels begin: after 70% and 85% of the period."""
    start, end = period(config)
    return start + int(VALIDATION_SHARE * (end - start)), start + int(TEST_SHARE * (end - start))
