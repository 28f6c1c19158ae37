"""How many values a category of a log may have."""

from __future__ import annotations

from vista.config.checks import require

MAX_VALUES = 1_000_000
"""The limit unless the configuration of the table raises it: far more values are likely a mistake, such as a column of
ids or times."""
_MOST = 2**31 - 2
"""Codes are int32."""


def check_max_values(value: int, key: str) -> None:
    """Check the limit of a table. Raises ConfigError."""
    require(1 <= value <= _MOST, key, f"must lie in 1 … {_MOST:,}")
