"""A user's history over time: events per bin of time and kind, so that any history fits a chart."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from vista.explore.item_names import ItemNames
from vista.log.event_log import EventLog
from vista.log.histories import Histories

NUM_BINS = 60
MAX_KINDS = 6
"""Kinds of events with a color of their own; the rest is "other"."""
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Timeline:
    """Counts of one history, and where its parts begin."""

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
