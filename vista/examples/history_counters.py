"""Counters as requests read them, made from whole histories: for training, and for evaluation without a store.

A request reads a record, which holds the counters of the first events of a history, quantized. The scorer advances
them to the time of the request, and adds the newer events of the tail. What follows here is that computation, by the
same code, for requests at any place of a history. Letters: B histories, T events, n requests, G fields, F values per
key.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.counters.counter_codes import CounterCodes, ItemKeys
from vista.counters.counter_table import OccurrenceIndex, UserCounters
from vista.log.event_log import EventLog
from vista.log.histories import ranges


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
