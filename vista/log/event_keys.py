"""Keys that name events: user, item, time, and action. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config.log_config import AGAIN
from vista.log.histories import DAY_MS, PackedTable, RowFeatures, ranges, take_range, token_groups
from vista.log.segment import Segment
from vista.log.segment_files import USERS
from vista.progress_bar import progress_bar

ROWS_AT_ONCE = 1 << 20
"""Default number of rows that are compared with keys at once."""


@dataclass(frozen=True, slots=True)
class EventKeys:
    """Keys of events: user and item rows, time (ms, or ordinal), and action code, int64 [N] each. action: None matches
    every action."""

    user: Int
    item: Int
    timestamp: Int
    action: Int | None

    def __len__(self) -> int:
        return len(self.user)

    def select(self, index: Int) -> EventKeys:
        action = None if self.action is None else self.action[index]
        return EventKeys(self.user[index], self.item[index], self.timestamp[index], action)


def forgotten_events(segment: Segment) -> EventKeys:
    """The keys in a segment's deletion rows."""
    table = segment.forgotten
    if table is None:
        return EventKeys(*(np.empty(0, np.int64) for _ in range(4)))
    user = np.repeat(table.users, np.diff(table.offsets))
    return EventKeys(user, *(table.columns[name].astype(np.int64) for name in ("item", "timestamp", "action")))


def equal_events(table: PackedTable, keys: EventKeys, *, rows_at_once: int = ROWS_AT_ONCE) -> tuple[Int, Int]:
    """All remaining rows of a table that match a key.

    Args:
        rows_at_once: rows at the times of keys that are compared at once; there are many if times are whole days. It
            never changes the result.

    Returns:
        (index of the key, row): int64 [M] each, by key, then by row.
    """
    start, count = table.locate(keys.user)
    here = np.flatnonzero(count)
    start, stop, times = start[here], start[here] + count[here], keys.timestamp[here]
    low = table.first_since(start, stop, times)
    num = table.first_since(low, stop, times + 1) - low
    pairs = [(here[:0], low[:0])]
    with progress_bar(total=len(num), desc="match events", unit="event", unit_scale=True, leave=False) as bar:
        for part in token_groups(num, rows_at_once):
            row, key = ranges(low[part], num[part]), np.repeat(here[part], num[part])
            place = table.places(row)
            equal = table.columns["item"][place] == keys.item[key]
            if keys.action is not None:
                equal &= table.columns["action"][place] == keys.action[key]
            pairs.append((key[equal], row[equal]))
            bar.update(len(num[part]))
    return np.concatenate([key for key, _ in pairs]), np.concatenate([row for _, row in pairs])


def obey_deletions(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """The segments, oldest first, without the rows that later segments delete. Reads only the affected users.

    A forgotten event is removed from every earlier segment, however often it occurs there. An erased user loses all
    events, impressions, and features in earlier segments. Rows that are added again in the same or a later segment
    count.

    Raises:
        LogFormatError: if there are deletions, and the ids, offsets, deletions, or user features of a segment are
            damaged.
    """
    if not any(segment.num_deletions for segment in segments[1:]):
        return tuple(segments)
    for segment in segments:
        segment.files.verify(large=False)
    left = []
    forgotten: list[EventKeys] = []
    erased = np.empty(0, np.int64)
    for segment in reversed(segments):
        gone = [equal_events(segment.events, keys)[1] for keys in forgotten]
        events = segment.events.without(np.unique(np.concatenate([_rows_of(segment.events, erased), *gone])))
        impressions = segment.impressions
        if impressions is not None:
            impressions = impressions.without(_rows_of(impressions, erased))
        features = dict(segment.features)
        if USERS in features and np.isin(features[USERS].rows, erased).any():
            features[USERS].verify()
            features[USERS].check()
            features[USERS] = features[USERS].without(erased)
        left.append(replace(segment, events=events, impressions=impressions, features=features))
        forgotten += [forgotten_events(segment)] if segment.forgotten is not None else []
        erased = np.union1d(erased, segment.erased)
    return tuple(reversed(left))


def _rows_of(table: PackedTable, users: Int) -> Int:
    return ranges(*table.locate(users))


@dataclass(frozen=True, slots=True)
class Impressions:
    """All impressions of a log, by user row and time, with a label per task. Arrays may be read-only views of the log.

    offsets: int64 [num_users + 1]; item: int32 [N] item rows; timestamp: int64 [N] ms; label: uint8 [N, num_tasks], 0
    where unknown; mask: uint8 [N, num_tasks], 1 where the label is known; tasks: names of the tasks; probability:
    float32 [N, num_tasks] true probabilities of a simulation (NaN where unknown), or None; delay: int64 [num_tasks] ms
    after an impression until its label is known, 0 for all labels but AGAIN; features: of N rows, with the names of
    `EventLog.request_features`.
    """

    offsets: Int
    item: NDArray[np.int32]
    timestamp: Int
    label: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    tasks: list[str]
    probability: NDArray[np.float32] | None
    delay: Int
    features: RowFeatures = field(default_factory=lambda: RowFeatures({}))

    @property
    def num_impressions(self) -> int:
        return int(self.offsets[-1])

    def known(self, rows: Int, before: Int | int) -> NDArray[np.bool_]:
        """Where labels depend only on what happened before a time: bool [n, num_tasks].

        Args:
            rows: int64 [n].
            before: ms, one for all rows or int64 [n].
        """
        end = np.broadcast_to(before, rows.shape)[:, None] - self.delay  # times may be as large as int64
        known: NDArray[np.bool_] = (self.mask[rows] > 0) & (self.timestamp[rows, None] < end)
        return known


def read_impressions(segments: Sequence[Segment], num_users: int, end: int) -> Impressions:
    """Impressions of a log: views of the files of one segment, or those of several segments merged in memory by time.

    If only some segments have probabilities, those of the others are NaN.

    Args:
        end: ms of the log's newest event. A log does not say how many days decide a label AGAIN that was given with the
            impressions. But it is only known where these end by then, so they are at most the time from the newest
            known one to the end.
    """
    tables = [segment.impressions for segment in segments if segment.impressions is not None]
    tasks: list[str] = next(s.manifest["tasks"] for s in reversed(segments) if s.impressions is not None)
    counts = sum((table.counts(num_users) for table in tables), np.zeros(num_users, np.int64))
    columns, features, offsets = take_range(tables, np.arange(num_users), np.zeros(num_users, np.int64), counts)
    delay = np.zeros(len(tasks), np.int64)
    if (days := segments[-1].manifest["again_days"]) is not None:
        delay[tasks.index(AGAIN)] = round(days * DAY_MS)
    elif AGAIN in tasks and (known := np.asarray(columns["mask"])[:, tasks.index(AGAIN)] > 0).any():
        delay[tasks.index(AGAIN)] = max(end - int(np.asarray(columns["timestamp"])[known].max()), 0)
    return Impressions(
        offsets,
        columns["item"],
        columns["timestamp"],
        columns["label"],
        columns["mask"],
        list(tasks),
        columns.get("probability"),
        delay,
        features,
    )
