"""What the page shows about one user, and about all records of a store."""

from __future__ import annotations

import calendar
import time
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import numpy as np

from vista.arrays import Int
from vista.config.model_config import CALENDAR, ITEM, PREVIOUS
from vista.counters.counters import CounterSpec
from vista.counters.keys import values_of
from vista.explore.workspace import UserSearch, Workspace, record_of
from vista.log.event_log import EventLog
from vista.log.histories import LATEST_MS, NO_TIMESTAMP, YEAR_1971_MS, Histories, RowFeatures
from vista.log.inspection import ItemNames
from vista.log.splits import Until, parse_until
from vista.scorer import Scorer
from vista.scorer.explanation import duration
from vista.store.admin import GenerationStats, StoreStats, store_stats
from vista.store.backend import open_backend
from vista.store.layout import stores_in
from vista.store.manifest import OF_SEVERAL_LOGS, Manifest
from vista.store.reader import StoredBatch

NUM_BINS = 60
MAX_KINDS = 6
"""Kinds of events with a color of their own; the rest is "other"."""
OTHER = "other"
SAMPLE_USERS = 500
"""Users whose records are read to show gaps."""


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
    """Read a user's record and the length of the history. Raises StoreError if the record is damaged, and TypeError if
    the user's id is of another type than those of the log."""
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
        summary_shape=(stored.summary.shape[1] - (scorer.model.config.space_dim > 0), stored.summary.shape[2]),
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
            names = _names_of_keys(workspace, scorer, field, one.key.astype(np.int64))
            values, columns = one.values(), counter_columns(one.spec)
            key = ITEM if field == ITEM else "value"
            rows = [
                {key: name, **dict(zip(columns, row, strict=True))}
                for name, row in zip(names, values.tolist(), strict=True)
            ]
            fields[field] = sorted(rows, key=lambda row: -row[columns[0]])
    return fields


def _names_of_keys(workspace: Workspace, scorer: Scorer, field: str, key: Int) -> list[str]:
    """The values that keys int64 [E] of a field stand for, in words; only a number for hashed keys."""
    model = scorer.model
    assert model.item_keys is not None
    codes = values_of(field, key, len(model.items), model.item_keys.sizes)
    if codes is None:
        return [f"pair {number}" for number in key.tolist()]
    if not codes:
        return ["all items"] * len(key)
    names = []
    for part, own in codes.items():
        if part in (ITEM, PREVIOUS):
            names.append(workspace.names.of_ids(_item_ids(scorer, own)))
        elif part in CALENDAR:
            words = list(calendar.month_name)[1:] if part == "month" else list(calendar.day_name)
            names.append([words[code - 1] for code in own.tolist()])
        else:
            assert model.feature_table is not None
            names.append(model.feature_table.values[part].ids(own - 1).tolist())
    return [", ".join(values) for values in zip(*names, strict=True)]


def counter_columns(spec: CounterSpec) -> list[str]:
    """Names of the values per key, in the order of `CounterSpec`."""
    age = "seconds since the last" if spec.has_time else "events since the last"
    days = [f"~{days:g} days" for days in spec.days]
    return ["count", *days, *(f"~{events:g} events" for events in spec.events), age]


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


def _time(time_ms: np.int64) -> int | None:
    return None if time_ms == NO_TIMESTAMP else int(time_ms)


@dataclass(frozen=True, slots=True)
class Timeline:
    """Events of one history per bin of time and kind, so that any history fits a chart, and where its tail begins."""

    rows: list[dict[str, Any]]
    """{"time": begin of the bin, "end", "kind", "events", "below", "above"}, without empty bins. Times are in ms, or
    ordinals. The last two stack the kinds of a bin: "above" is "below" plus "events"."""
    kinds: list[str]
    """The most frequent first."""
    kind_name: str
    """What a kind is: "action", or a category of items, such as "genres"."""
    tail_from: int | None
    """Time of the first event of the tail; None without a tail."""


def timeline(log: EventLog, history: Histories, names: ItemNames, tail_times: list[int]) -> Timeline:
    """Count a history.

    Args:
        log: names the actions.
        history: of one user.
        names: if items have groups, these are the kinds of events; otherwise actions are.
        tail_times: times of the tail's events, oldest first.
    """
    times = np.asarray(history.timestamp)
    if names.groups is not None:
        kind_name = names.group_name
        kinds = [group or OTHER for group in names.groups_of_ids(log.items.ids(history.item).tolist())]
    else:
        kind_name = "action"
        kinds = [log.actions[code] if log.actions else "event" for code in history.action.tolist()]
    frequent = [kind for kind, _ in Counter(kinds).most_common(MAX_KINDS)]
    edges = np.unique(np.linspace(times[0], times[-1] + 1, NUM_BINS + 1).astype(np.int64)) if len(times) else times
    places = np.searchsorted(edges, times, side="right") - 1
    counted = Counter(
        (place, kind if kind in frequent else OTHER) for place, kind in zip(places.tolist(), kinds, strict=True)
    )
    ordered = [*frequent, *([OTHER] if any(kind == OTHER for _, kind in counted) and OTHER not in frequent else [])]
    rows: list[dict[str, Any]] = []
    for place in sorted({place for place, _ in counted}):
        below = 0
        for kind in ordered:
            if count := counted[place, kind]:
                time, end = int(edges[place]), int(edges[place + 1])
                rows.append(
                    {"time": time, "end": end, "kind": kind, "events": count, "below": below, "above": below + count}
                )
                below += count
    return Timeline(rows, ordered, kind_name, tail_times[0] if tail_times else None)


class Freshness(Enum):
    """How a store relates to its log."""

    fresh = "Fresh"
    partial = "Held back"
    behind = "Behind the log"
    unknown = "Unknown"


@dataclass(frozen=True, slots=True)
class StoreFreshness:
    """Whether a store covers its log, and why."""

    state: Freshness
    reason: str


def store_freshness(manifest: Manifest, log: EventLog | None, now_ms: int | None = None) -> StoreFreshness:
    """Compare a store with the log that it was refreshed from.

    Args:
        manifest: of the served generation.
        log: None if it is not open.
        now_ms: the current time, ms; None asks the clock.
    """
    now = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    age = f"The last refresh started {duration((now - max(manifest.refreshed_at, manifest.created_at)) / 1000)} ago"
    if log is None:
        return StoreFreshness(Freshness.unknown, f"{age}. Without the log, newer events are unknown.")
    if manifest.applied_segment == OF_SEVERAL_LOGS:
        return StoreFreshness(
            Freshness.unknown,
            f"{age}. The store was merged from several logs, so newer events of this one are unknown.",
        )
    if manifest.applied_segment < log.last_segment:
        count = log.last_segment - manifest.applied_segment
        num_changed = len(log.changed_users(manifest.applied_segment))
        changed = f"{num_changed:,} user{'s' * (num_changed != 1)}"
        segments = f"{count} newer segment{'s' * (count != 1)}"
        return StoreFreshness(
            Freshness.behind,
            f"{age}. The log has {segments} with changes of {changed}; run `vista refresh ... incremental=true`.",
        )
    if parse_until(manifest.until) != Until():
        return StoreFreshness(
            Freshness.partial, f"{age} and covered all segments, but only events until={manifest.until}, as requested."
        )
    return StoreFreshness(Freshness.fresh, f"{age}, and it covers every segment of the log.")


def generation_rows(store: str) -> tuple[list[dict[str, Any]], list[str]]:
    """A row per generation of a store and its shards, and the problems found. Raises StoreError if there is no
    store."""
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for root in stores_in(store):
        stats = store_stats(root)
        rows += [_row(stats, one) for one in reversed(stats.generations)]
        problems += [stats.problem] * bool(stats.problem)
        problems += [f"gen-{one.number}: {one.problem}" for one in stats.generations if one.problem]
        problems += open_backend(root).problems()
    return rows, problems


def _row(stats: StoreStats, one: GenerationStats) -> dict[str, Any]:
    if one.manifest is None:
        return {"generation": one.number, "state": "damaged"}
    manifest, size = one.manifest, one.live_bytes if one.size_bytes is None else one.size_bytes
    served = one.number == stats.published
    return {
        "generation": one.number,
        "state": "served" if served else "kept" if one.complete else "unfinished",
        "users": one.num_records,
        "refreshed": shown_time(max(manifest.refreshed_at, manifest.created_at)),
        "events": "all" if manifest.until in (None, "all") else f"until={manifest.until}",
        "bytes per user": round(one.live_bytes / one.num_records) if one.num_records else None,
        "on disk (MB)": round(size / 1e6, 1),
        "codec": manifest.codec,
        "vectors": f"{manifest.num_tokens} x {manifest.dim}",
        "tail": manifest.tail_len,
        "summarizer": manifest.summarizer_id[:12],
    }


@dataclass(frozen=True, slots=True)
class RecordSample:
    """Records of some users, to judge the whole store by."""

    num_users: int
    without_record: int
    behind: int
    """Users whose record covers fewer events than the log has."""
    covered: list[dict[str, Any]]
    """Per user: {"events": events of the log, "covered": events of the record}; empty without a log."""


def record_sample(scorer: Scorer, log: EventLog | None, users: UserSearch) -> RecordSample:
    """Read the records of up to SAMPLE_USERS users, the same ones at every call. Raises StoreError if a record is
    damaged."""
    rows = users.sample(SAMPLE_USERS)
    if not len(rows):
        return RecordSample(0, 0, 0, [])
    stored = scorer.store.get_many(users.users.ids(rows))
    found = stored.found
    if log is None:
        return RecordSample(len(rows), int((~found).sum()), 0, [])
    events = log.lengths[rows]
    covered = [
        {"events": int(has), "covered": int(covers)}
        for has, covers in zip(events[found], stored.event_count[found], strict=True)
    ]
    behind = int((found & (stored.event_count < events)).sum())
    return RecordSample(len(rows), int((~found).sum()), behind, covered)
