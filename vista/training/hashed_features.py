"""Features of a log whose values share rows by a hash (`model.hashed_features`)."""

from __future__ import annotations

from collections.abc import Mapping

from vista.errors import ConfigError
from vista.log.event_log import EventLog
from vista.log.item_features import CategoryColumn


def check_hashed_features(hashed: Mapping[str, int], log: EventLog) -> None:
    """Refuse hashed features that a log lacks.

    Args:
        hashed: by name of a feature, of anything that has features: the number of rows.

    Raises:
        ConfigError: if the log has no category with this name.
    """
    categories = _categories(log) if hashed else set()
    for name in hashed:
        if name not in categories:
            raise ConfigError(
                f"model.hashed_features: {log.path} has no category {name!r}; it has: "
                f"{', '.join(sorted(categories)) or 'none'}"
            )


def _categories(log: EventLog) -> set[str]:
    """Names of all categories of a log."""
    items = {} if log.item_features is None else log.item_features.columns
    rows = (log.event_features, log.request_features, log.user_features.values)
    return {name for name, column in items.items() if isinstance(column, CategoryColumn)} | {
        name for columns in rows for name, known in columns.items() if known is not None
    }
