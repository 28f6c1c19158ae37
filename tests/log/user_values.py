"""The features of a log's users as plain dictionaries."""

from __future__ import annotations

from typing import Any

import numpy as np

from vista.log.event_log import EventLog


def user_features_of(log: EventLog) -> dict[str, dict[Any, Any]]:
    """The features of users that are not missing: column -> id -> value."""
    features = log.user_features
    rows = np.flatnonzero(log.users.has_ids(np.arange(log.num_users)))
    ids, chosen = log.users.ids(rows).tolist(), features.rows.select(rows)
    found: dict[str, dict[Any, Any]] = {}
    for name, values in features.values.items():
        column = chosen.columns[name].tolist()
        texts = column if values is None else [None if code < 0 else values.ids([code])[0] for code in column]
        found[name] = {user: text for user, text in zip(ids, texts, strict=True) if text is not None and text == text}
    return found
