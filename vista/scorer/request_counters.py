"""Counters of a request's users, as of the request. B users."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.counters.counter_codes import CounterCodes, decode_values
from vista.store.stored_batch import StoredBatch
from vista.store.tail import Tail


@dataclass(frozen=True, slots=True)
class RequestCounters:
    """What the model reads of the items that each of B users had."""

    codes: CounterCodes
    """Of the items, as of the request."""
    num_events: Int
    """int64 [B] events that they count."""

    @classmethod
    def of(cls, stored: StoredBatch, tail: Tail, is_fresh: NDArray[np.bool_], now: Int | None) -> RequestCounters:
        """The stored counters, with the fresh events of the tail added, which the records do not cover.

        Training and evaluation on raw histories advance counters by the same function
        (`vista.examples.history_counters`).

        Args:
            stored: of a store with counters; users without a record have none.
            tail: of the request, with items as model rows. Fresh events that are no longer in it are not counted.
            is_fresh: bool [T] its events that the records do not cover.
            now: int64 [B] ms, or None if unknown.
        """
        fresh = np.flatnonzero(is_fresh)
        offsets = np.searchsorted(fresh, tail.offsets)
        codes = stored.counters[0].advanced(now, tail.items[fresh].astype(np.int64), tail.times[fresh], offsets)
        return cls(codes, stored.event_count + np.diff(offsets))

    def counts(self, rows: Int) -> NDArray[np.float32]:
        """Decoded counters float32 [C, F] of candidates int64 [C] for the first user; NaN if they are not counted."""
        codes = self.codes.lookup(np.zeros_like(rows), rows)
        values = decode_values(self.codes.spec, codes).astype(np.float32)
        values[codes[:, 0] == 0] = np.nan
        return values

    def select(self, users: slice | Int) -> RequestCounters:
        """Counters of some of the users, or of all of them in another order."""
        index = np.arange(len(self.num_events))[users]
        return RequestCounters(self.codes.select(index), self.num_events[index])
