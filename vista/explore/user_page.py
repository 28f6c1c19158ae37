"""What the page shows about one user: the record, the tail, and the counters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from vista.config.model_config import ITEM
from vista.counters.counter_codes import CounterSpec
from vista.explore.explore_workspace import Workspace, record_of
from vista.log.gaps import LATEST_MS, NO_TIMESTAMP, YEAR_1971_MS
from vista.log.histories import Histories
from vista.log.row_features import RowFeatures
from vista.scorer import Scorer
from vista.store.stored_batch import StoredBatch

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True, slots=True)
class UserFacts:
    """A user's record and history, side by side."""

    user: int | str
    in_log: bool
    has_record: bool
    num_events: int | None
    """Events of the log; None without a log."""
    num_covered: int
    """Events that the record covers."""
    created_at: int | None
    """When the record was written, ms."""
    newest_at: int | None
    """Time of the newest event that the record covers, ms or an ordinal."""
    summary_shape: tuple[int, int]
    tail: list[dict[str, Any]]
    """Newest event first: item, name, time, action, and features."""
    counters: dict[str, list[dict[str, Any]]]
    """By field: the keys with the highest counts, with a column per value of `CounterSpec`."""

    @property
    def num_missing(self) -> int | None:
        """Events of the log that the record lacks; None if one of the two is unknown."""
        return None if self.num_events is None or not self.has_record else max(self.num_events - self.num_covered, 0)


def user_facts(workspace: Workspace, scorer: Scorer, user: int | str) -> UserFacts:
    """Read a user's record and the length of the history.

    Raises:
        StoreError: the record is damaged.
        TypeError: the user's id is of another type than those of the log.
    """
    log = workspace.log
    stored = record_of(scorer, user)
    row = -1 if log is None else int(log.users.rows(cast(list[str], [user]))[0])
    return UserFacts(
        user=user,
        in_log=row >= 0,
        has_record=bool(stored.found[0]),
        num_events=None if log is None or row < 0 else int(log.lengths[row]),
        num_covered=int(stored.event_count[0]),
        created_at=_time(stored.created_at[0]),
        newest_at=_time(stored.last_event_ts[0]),
        summary_shape=(stored.summary.shape[1], stored.summary.shape[2]),
        tail=tail_rows(workspace, scorer, stored),
        counters=counter_rows(workspace, scorer, stored),
    )


def tail_rows(workspace: Workspace, scorer: Scorer, stored: StoredBatch) -> list[dict[str, Any]]:
    """The tail of one user's record, newest event first."""
    model, tail = scorer.model, stored.tail
    ids = _item_ids(scorer, tail.items)
    features = {} if model.event_features is None else RowFeatures(tail.features).named(model.event_features.values)
    columns = {name: column.tolist() for name, column in features.items()}
    actions = model.schema.actions
    rows = [
        {
            "item": ids[place],
            "name": name,
            "time": int(tail.times[place]),
            "action": actions[tail.actions[place]] if actions else "",
            **{feature: values[place] for feature, values in columns.items()},
        }
        for place, name in enumerate(workspace.names.of_ids(ids))
    ]
    return rows[::-1]


def counter_rows(workspace: Workspace, scorer: Scorer, stored: StoredBatch) -> dict[str, list[dict[str, Any]]]:
    """The counters of one user's record, by field, the highest counts first; {} for a model without counters."""
    fields: dict[str, list[dict[str, Any]]] = {}
    for counters in stored.counters[:1]:
        for field, one in zip(counters.spec.fields, stored.counters, strict=True):
            if field == ITEM:
                names = workspace.names.of_ids(_item_ids(scorer, one.key))
            else:
                assert scorer.model.feature_table is not None
                names = scorer.model.feature_table.values[field].ids(one.key - 1).tolist()
            values, columns = one.values(), counter_columns(one.spec)
            key = ITEM if field == ITEM else "value"
            rows = [
                {key: name, **dict(zip(columns, row, strict=True))}
                for name, row in zip(names, values.tolist(), strict=True)
            ]
            fields[field] = sorted(rows, key=lambda row: -row[columns[0]])
    return fields


def counter_columns(spec: CounterSpec) -> list[str]:
    """Names of the values per key, in the order of `CounterSpec`."""
    age = "seconds since the last" if spec.has_time else "events since the last"
    days = [f"last ~{days:g} days" for days in spec.days]
    return ["count", *days, *(f"last ~{events:g} events" for events in spec.events), age]


def history_of(workspace: Workspace, user: int | str) -> Histories | None:
    """The user's events in the log; None without a log, or for a user that it does not have."""
    log = workspace.log
    return None if log is None or user not in log else log[user]


def frequent_items(workspace: Workspace, history: Histories, limit: int) -> list[dict[str, Any]]:
    """The items that a user had most often: item, number of events, time of the last one."""
    log = workspace.log
    assert log is not None
    distinct, inverse, counts = np.unique(history.item, return_inverse=True, return_counts=True)
    last = np.full(len(distinct), NO_TIMESTAMP)
    np.maximum.at(last, inverse, np.asarray(history.timestamp))
    order = np.lexsort((-last, -counts))[:limit]
    names = workspace.names.of_ids(log.items.ids(distinct[order]).tolist())
    return [
        {"item": name, "events": int(counts[place]), "last": int(last[place])}
        for name, place in zip(names, order.tolist(), strict=True)
    ]


def _item_ids(scorer: Scorer, rows: Any) -> list[Any]:
    """Ids of model rows; None for items that the model does not know."""
    if not len(rows):
        return []
    ids = scorer.model.items.ids(np.maximum(rows, 1) - 1).tolist()
    return [item if row else None for item, row in zip(ids, np.asarray(rows).tolist(), strict=True)]


def shown_time(time_ms: int | None) -> str:
    """A time with its date; an ordinal of a log without times as it is."""
    if time_ms is None:
        return "–"
    if not YEAR_1971_MS <= time_ms < LATEST_MS:
        return f"{time_ms:,}"
    return str(np.datetime64(time_ms // 60_000, "m")).replace("T", " ")


def shown_age(milliseconds: float) -> str:
    """A duration in its largest fitting unit, such as "3 hours"."""
    seconds = max(milliseconds, 0) / 1000
    for unit, size in (("day", SECONDS_PER_DAY), ("hour", 3_600), ("minute", 60)):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count:,} {unit}{'s' * (count != 1)}"
    return "less than a minute"


def _time(time_ms: np.int64) -> int | None:
    return None if time_ms == NO_TIMESTAMP else int(time_ms)
