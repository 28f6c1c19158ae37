"""Chunks: packed stretches of users' histories, from which training batches are cut.

Letters: B chunks, T packed events, N impressions, C columns and D dense inputs of features, S seeds, M model dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.config import DataConfig, TrainConfig
from vista.config.checks import Decay
from vista.counters.counters import CounterCodes, ItemKeys, OccurrenceIndex, UserCounters
from vista.log.event_keys import Impressions
from vista.log.event_log import EventLog
from vista.log.histories import gap_bucket, ranges, token_groups
from vista.log.splits import EVENTS_PER_BLOCK, split_until

# Counters as requests read them, made from whole histories: for training, and for evaluation without a store.
#
# A request reads a record, which holds the counters of the first events of a history, quantized. The scorer advances
# them to the time of the request, and adds the newer events of the tail. What follows here is that computation, by the
# same code, for requests at any place of a history. Letters: B histories, T events, n requests, G fields, F values per
# key.


@dataclass(frozen=True, slots=True)
class CounterRequests:
    """Requests on histories: what the record covers, what of the rest the tail holds, and when."""

    history: Int
    """int64 [n] from 0."""
    covered: Int
    """int64 [n] events that the record covers."""
    tail_start: Int
    """int64 [n] position of the tail's first event. Events between the record and the tail are not counted, because
    nobody tells the scorer of them."""
    seen: Int
    """int64 [n] events before the request."""
    now: Int
    """int64 [n] times in ms."""
    is_timed: NDArray[np.bool_]
    """bool [n]: False where the caller passes no time. Counters are then those of the newest event."""

    @property
    def first(self) -> Int:
        """int64 [n] position of the first event that is added to the record's counters."""
        return np.minimum(np.maximum(self.covered, self.tail_start), self.seen)


class HistoryCounters:
    """Counters of B histories, at any place."""

    def __init__(self, keys: ItemKeys, item: Int, time: Int, offsets: Int) -> None:
        """
        Args:
            keys: what records hold, and what the items are counted as.
            item: int64 [T] model rows, from each history's first event on; time: int64 [T] ms.
            offsets: int64 [B + 1].
        """
        self._keys = keys
        self._events = keys.of(item)
        """int64 [T] keys of the events, per field."""
        self._time, self._offsets = time, offsets
        self._indices = [OccurrenceIndex(keys.spec, key, time, offsets) for key in self._events]

    @classmethod
    def of(cls, keys: ItemKeys, log: EventLog, item_rows: Int, user: Int, stop: Int) -> tuple[HistoryCounters, Int]:
        """Counters of some users of a log, each user's history once, and int64 [n], the history of each entry.

        Args:
            item_rows: int64 [log.num_items], the model row of each of the log's items.
            user: int64 [n] rows of the log; repeats are allowed.
            stop: int64 [n]; only the first stop[i] events of user[i] are counted.
        """
        users, history = np.unique(user, return_inverse=True)
        last = np.zeros(len(users), np.int64)
        np.maximum.at(last, history, stop)
        events = log.gather_ranges(users, np.zeros_like(last), last, features=False)
        return cls(keys, item_rows[events.item], np.asarray(events.timestamp), events.offsets), history

    def at(self, requests: CounterRequests) -> UserCounters:
        """The counters of each request."""
        stored, record = self._stored(requests)
        index, offsets, now = self._added(requests, stored[0].clock[record])
        codes, *categories = [
            one.select(record).advanced(now, key[index], self._time[index], offsets)
            for one, key in zip(stored, self._events, strict=True)
        ]
        return UserCounters(codes, requests.covered + np.diff(offsets), tuple(categories), self._keys)

    def of_items(self, requests: CounterRequests, item: Int) -> NDArray[np.uint8]:
        """Codes uint8 [n, G * F + 1] of one item int64 [n] per request (`UserCounters.of_pairs`).

        Those of `at`, but in half the time, and in memory for one item per request.
        """
        stored, record = self._stored(requests)
        index, offsets, now = self._added(requests, stored[0].clock[record])
        own = []
        for one, wanted, events in zip(stored, self._keys.of(item), self._events, strict=True):
            codes = one.lookup(record, wanted)
            has_codes = codes.any(1)
            bounds = offsets_of(np.asarray(has_codes, np.int64))
            held = wanted[has_codes].astype(np.int32)
            found = CounterCodes(one.spec, held, codes[has_codes], bounds, one.clock[record])
            # Other keys are events too, but not counted: as the unknown item.
            key = events[index]
            new = np.where(key == np.repeat(wanted, np.diff(offsets)), key, 0)
            own.append(found.advanced(now, new, self._time[index], offsets))
        counters = UserCounters(own[0], requests.covered + np.diff(offsets), tuple(own[1:]), self._keys)
        return counters.of_pairs(np.arange(len(item)), item)

    def _stored(self, requests: CounterRequests) -> tuple[list[CounterCodes], Int]:
        """What records hold in each field, and int64 [n], the record of each request."""
        records, record = np.unique(np.stack([requests.history, requests.covered]), axis=1, return_inverse=True)
        tables = [index.table(records[0], records[1]) for index in self._indices]
        return [table.top(most).codes() for table, most in zip(tables, self._keys.spec.keys, strict=True)], record

    def _added(self, requests: CounterRequests, clock: Int) -> tuple[Int, Int, Int]:
        """The events that are added, int64 [N], their offsets int64 [n + 1], and the times of the requests int64 [n].

        Args:
            clock: int64 [n] of the records.
        """
        first = requests.first
        index = ranges(self._offsets[requests.history] + first, requests.seen - first)
        offsets = offsets_of(requests.seen - first)
        newest = clock.copy()
        has_new = np.flatnonzero(requests.seen > first)
        newest[has_new] = np.maximum(clock[has_new], self._time[index[offsets[has_new + 1] - 1]])
        return index, offsets, np.where(requests.is_timed, requests.now, newest)


@dataclass(frozen=True, slots=True)
class ChunkImpressions:
    """Labeled impressions of all chunks, sorted by chunk and position."""

    chunk: Int
    """int64 [N]."""
    position: Int
    """int64 [N] events of the chunk strictly before the impression."""
    item: Int
    """int64 [N] model item rows."""
    gap: Int
    """int64 [N] log buckets of the time since the newest event before the impression."""
    label: NDArray[np.float32]
    """float32 [N, num_tasks]."""
    mask: NDArray[np.bool_]
    """bool [N, num_tasks]: True where a task's label is known."""
    time: Int
    """int64 [N] ms."""
    entry: Int | None = None
    """int64 [N + 1, C] features of their requests; the last row is that of a request without features. None for a model
    that reads none."""
    dense: NDArray[np.float32] | None = None
    """float32 [N + 1, D], like `entry`."""


@dataclass(frozen=True, slots=True)
class ChunkTimeline:
    """The events of each chunk and, as its trail, those after it that training may see. Only anchors read it.

    The trail holds labels only: it is never part of a chunk's own events.
    """

    item: Int
    """int64 [N] model item rows; 0 is the unknown item."""
    time: Int
    """int64 [N] ms, or positions in a log without times."""
    offsets: Int
    """int64 [B+1]."""


@dataclass(frozen=True, slots=True)
class ChunkCounters:
    """The whole histories of the chunks' users, which counters cover, and where the chunks lie in them."""

    histories: HistoryCounters
    history: Int
    """int64 [B] the history of each chunk."""
    start: Int
    """int64 [B] events of the history before the chunk's first event."""
    covered: Int | None
    """int64 [B] events of the history that a stored record covers; None if records end where summaries are cut."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """Stretches of histories, end to end, oldest event first within a chunk."""

    user: Int
    """int64 [B] user rows of the log."""
    item: Int
    """int64 [T] model item rows; 0 is the unknown item."""
    action: Int
    """int64 [T]."""
    rating: NDArray[np.float32] | None
    """float32 [T]."""
    gap: Int
    """int64 [T] log buckets of the time since the event before."""
    clock: Int
    """int64 [T] from `decay_clock`."""
    offsets: Int
    """int64 [B+1]."""
    impressions: ChunkImpressions
    timeline: ChunkTimeline | None = None
    """What anchors ask about; None draws no anchors."""
    lead: Int | None = None
    """int64 [B]: with stored summaries, the first events of each chunk that serve as context only."""
    summary: NDArray[np.float32] | None = None
    """float32 [B, S, M] stored summaries; None computes them from the batch's own events."""
    counters: ChunkCounters | None = None
    """Counters of the chunks' users; None without counters."""
    entry: Int | None = None
    """int64 [T, C] features of the events, as in `BatchEvents`; None for a model that reads none."""
    dense: NDArray[np.float32] | None = None
    """float32 [T, D], like `entry`."""
    user_entry: Int | None = None
    """int64 [B + 1, C] features of the users; the last row is that of an unknown user. None for a model that reads
    none."""
    user_dense: NDArray[np.float32] | None = None
    """float32 [B + 1, D], like `user_entry`."""

    @property
    def num_context(self) -> Int:
        """int64 [B] first events of each chunk that serve as context only."""
        return np.zeros(len(self.offsets) - 1, np.int64) if self.lead is None else self.lead


def decay_clock(decay: Decay, timestamp: Int) -> Int:
    """int64 [T] that decay is measured by: milliseconds or packed positions. Only differences within a chunk count."""
    return np.arange(len(timestamp), dtype=np.int64) if decay is Decay.position else timestamp


# The labeled impressions that training may use. Letters: N impressions, B chunks.


@dataclass(frozen=True, slots=True)
class VisibleRows:
    """Impressions that training may see, in the log's order; int64 [N] each."""

    row: Int
    """Rows of the log's impressions."""
    user: Int
    """Rows of the log."""
    position: Int
    """Events of the user strictly before the impression."""
    before: Int
    """Time of the newest of these (ms); arbitrary if there is none."""

    def select(self, index: Int) -> VisibleRows:
        """Some of the rows."""
        return VisibleRows(self.row[index], self.user[index], self.position[index], self.before[index])


def visible_rows(log: EventLog, table: Impressions, counts: Int, data: DataConfig, since: int | None) -> VisibleRows:
    """The impressions of the training part, with or without a known label.

    Args:
        table: the log's impressions.
        counts: int64 [num_users] events of each user that training may use.
        since: leave out the impressions before this time (ms).
    """
    # An impression between the last visible event and a hidden one may show the hidden label itself.
    hides = counts < log.lengths
    until = split_until(data, "train")
    timestamp = np.asarray(table.timestamp)
    user = np.repeat(np.arange(log.num_users), np.diff(table.offsets))
    position = np.zeros(len(timestamp), np.int64)
    before = np.zeros(len(timestamp), np.int64)
    shown = np.flatnonzero(np.diff(table.offsets))
    for part in token_groups(log.lengths[shown], EVENTS_PER_BLOCK):
        users = shown[part]
        events = log.gather(users, features=False)
        begins, times_of_all = events.offsets.tolist(), np.asarray(events.timestamp)
        bounds = zip(table.offsets[users].tolist(), table.offsets[users + 1].tolist(), pairwise(begins), strict=True)
        for low, high, (begin, end) in bounds:
            times = times_of_all[begin:end]
            at = times.searchsorted(timestamp[low:high], side="left")
            position[low:high] = at
            before[low:high] = times[np.maximum(at - 1, 0)] if begin < end else timestamp[low:high]
    visible = position <= counts[user]
    if until.before is not None:
        visible &= timestamp < until.before
    else:
        visible &= (position < counts[user]) | ~hides[user]
    if since is not None:
        visible &= timestamp >= since
    kept = np.flatnonzero(visible)
    return VisibleRows(kept, user[kept], position[kept], before[kept])


@dataclass(frozen=True, slots=True)
class VisibleImpressions:
    """Impressions, sorted by user row and time."""

    user: Int
    """int64 [N] rows of the log."""
    position: Int
    """int64 [N] events of the user strictly before the impression."""
    item: Int
    """int64 [N] model item rows."""
    gap: Int
    """int64 [N] log buckets of the time since the newest event before the impression."""
    label: NDArray[np.float32]
    """[N, num_tasks]."""
    mask: NDArray[np.bool_]
    """[N, num_tasks]: True where the label is known."""
    time: Int
    """int64 [N] ms."""
    row: Int
    """int64 [N] rows of the log's impressions."""
    offsets: Int
    """int64 [num_users + 1]: user u has the impressions [offsets[u], offsets[u + 1])."""

    @classmethod
    def of(
        cls, log: EventLog, item_rows: Int, counts: Int, config: TrainConfig, tasks: list[str], since: int | None
    ) -> VisibleImpressions:
        """The impressions of the training part with a known label.

        Args:
            item_rows: int64 [log.num_items], the model row of each of the log's items.
            counts: int64 [num_users] events of each user that training may use.
            tasks: the labels that are trained.
            since: leave out the impressions before this time (ms).
        """
        table, data = log.impressions, config.data
        if table is None:
            none = np.zeros(0, np.int64)
            empty = np.zeros((0, 0), np.float32)
            return cls(none, none, none, none, empty, empty > 0, none, none, np.zeros(log.num_users + 1, np.int64))
        visible = visible_rows(log, table, counts, data, since)
        columns = [table.tasks.index(task) for task in tasks]
        mask = np.asarray(table.mask)[visible.row][:, columns].astype(np.bool_)
        kept = visible.select(np.flatnonzero(mask.any(1)))
        time = np.asarray(table.timestamp)[kept.row]
        use_time = log.has_time and config.model.reads("times")
        gap = np.where(kept.position > 0, gap_bucket(time - kept.before), 0) if use_time else kept.position * 0
        return cls(
            kept.user,
            kept.position,
            item_rows[table.item[kept.row]],
            gap,
            np.asarray(table.label)[kept.row][:, columns].astype(np.float32),
            mask[mask.any(1)],
            time,
            kept.row,
            offsets_of(np.bincount(kept.user, minlength=log.num_users)),
        )

    def ranges(self, user: Int, start: Int, stop: Int, first: Int) -> tuple[Int, Int]:
        """Index ranges of the impressions of chunks: positions in (start, stop], and `first` in a user's first chunk.

        So an impression between two chunks belongs to the earlier one, whose events it may see.

        Args:
            user: int64 [B] users of the chunks, which hold the events [start, stop) of these, int64 [B].
            first: int64 [B] events before a user's first chunk.
        """
        if len(self.position) == 0:
            return np.zeros(len(user), np.int64), np.zeros(len(user), np.int64)
        # (user, position) as one sorted key.
        width = int(max(self.position.max(), stop.max(initial=0))) + 2
        key = self.user * width + self.position
        low = np.searchsorted(key, user * width + np.where(start > first, start, first - 1), side="right")
        high = np.searchsorted(key, user * width + stop, side="right")
        return low, high
