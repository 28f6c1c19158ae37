"""Features of a log whose values share rows by a hash (`model.hashed_features`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from vista.errors import ConfigError
from vista.log.event_log import EventLog
from vista.log.item_features import CategoryColumn
from vista.log.vocabulary import Vocabulary
from vista.model.hashed_vocabulary import HashedVocabulary

logger = logging.getLogger(__name__)


def check_hashed_features(hashed: Mapping[str, int], log: EventLog) -> None:
    """Log how many values of each hashed feature share a row with another one.

    Args:
        hashed: by name of a feature, of anything that has features: the number of rows.

    Raises:
        ConfigError: if the log has no category with this name.
    """
    categories = _categories(log) if hashed else []
    for name, num_rows in hashed.items():
        found = [(owners, values) for owners, column, values in categories if column == name]
        if not found:
            raise ConfigError(
                f"model.hashed_features: {log.path} has no category {name!r}; it has: "
                f"{', '.join(sorted({column for _, column, _ in categories})) or 'none'}"
            )
        for owners, values in found:
            rows = HashedVocabulary(num_rows).rows(values.ids(np.arange(len(values))).tolist())
            of_row = np.bincount(rows, minlength=num_rows)
            logger.info(
                "feature %s of %s: %d values in %d hashed rows; %.0f%% of the values share a row",
                *(name, owners, len(values), num_rows),
                100 * float((of_row[rows] > 1).mean()) if len(rows) else 0.0,
            )


def _categories(log: EventLog) -> list[tuple[str, str, Vocabulary]]:
    """Owners, name, and values of all categories of a log."""
    items = {} if log.item_features is None else log.item_features.columns
    tables = {
        "items": {name: column.values for name, column in items.items() if isinstance(column, CategoryColumn)},
        "events": log.event_features,
        "impressions": log.request_features,
        "users": log.user_features.values,
    }
    return [
        (owners, name, known)
        for owners, columns in tables.items()
        for name, known in columns.items()
        if known is not None
    ]
