"""The record of a user in readable form."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from vista.log.histories import NO_TIMESTAMP, RowFeatures
from vista.model.vista_model import VistaModel
from vista.store.reader import StoreReader
from vista.store.sharded_reader import ShardedReader


def user_record(store: StoreReader | ShardedReader, model: VistaModel, user: int | str) -> dict[str, Any] | None:
    """The record of a user as JSON values; None without a record.

    Args:
        store: of the model's summaries.
        model: names the items, actions and features.
        user: an id as in the log.

    Raises:
        StoreError: the record is damaged, or the store is closed.
    """
    stored = store.get_many(cast(list[str], [user]))
    if not stored.found[0]:
        return None
    tail, rows = stored.tail, stored.tail.items
    ids = model.items.ids(np.maximum(rows, 1) - 1).tolist() if len(rows) else []
    events = model.event_features
    of_events = {} if events is None else RowFeatures(tail.features).named(events.values)
    users = model.user_features
    of_user = {} if users is None else RowFeatures(stored.features).named(users.values)
    summary = stored.summary[0].astype(np.float64)
    return {
        "user": user,
        "generation": stored.generation,
        "created_at": _time(stored.created_at[0]),
        "num_events": int(stored.event_count[0]),
        "newest_event_at": _time(stored.last_event_ts[0]),
        "summary_shape": list(summary.shape),
        "summary_norms": np.linalg.norm(summary, axis=1).tolist(),
        "features": {name: column.tolist()[0] for name, column in of_user.items()},
        "counted_keys": {
            field: len(one.key)
            for one in stored.counters[:1]
            for field, one in zip(one.spec.fields, stored.counters, strict=True)
        },
        "tail": [
            {
                "item": ids[place] if rows[place] else None,
                "time": int(tail.times[place]),
                "action": model.schema.actions[tail.actions[place]] if model.schema.actions else None,
                "features": {name: column.tolist()[place] for name, column in of_events.items()},
            }
            for place in range(len(rows))
        ],
    }


def _time(time_ms: np.int64) -> int | None:
    return None if time_ms == NO_TIMESTAMP else int(time_ms)
