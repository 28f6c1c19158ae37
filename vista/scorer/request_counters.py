"""Counters of a request's users, as of the request, and where they hold candidates.

Letters: B users, E counted items of all users together, F values per item (`CounterSpec`), C candidates, n counted
pairs of user and candidate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Int
from vista.counters.counter_codes import CounterCodes, cells_of, decode_values
from vista.counters.user_counters import UserCounters
from vista.store.stored_batch import StoredBatch
from vista.store.tail import Tail


@dataclass(frozen=True, slots=True)
class RequestCounters(UserCounters):
    """Counters of B users with E counted items, and where to find them."""

    cell: Int
    """int64 [E] user and key as one number, ascending."""

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
        return cls._made_of(codes, stored.event_count + np.diff(offsets))

    @classmethod
    def _made_of(cls, codes: CounterCodes, num_events: Int) -> RequestCounters:
        return cls(codes, num_events, cells_of(codes.owner, codes.key))

    def select(self, users: slice | Int) -> RequestCounters:
        """Counters of some of the users, or of all of them in another order."""
        index = np.arange(len(self.num_events))[users]
        return self._made_of(self.codes.select(index), self.num_events[index])

    def find(self, users: slice, rows: Tensor | None, columns: slice) -> tuple[Int, Int, Int]:
        """The counted candidates in a rectangle of users and columns: user and column within it, and place in `codes`.

        Args:
            users: some of the B users.
            rows: int64 model rows of the candidates, [C] or [B, C]; None for the rows 0 to V.
            columns: some of the candidates.

        Returns:
            int64 [n] each.
        """
        first, stop = self.codes.offsets[[users.start, users.stop]].tolist()
        if rows is None:
            key = self.codes.key[first:stop].astype(np.int64)
            found = np.flatnonzero((key >= columns.start) & (key < columns.stop))
            return (self.cell[first:stop][found] >> 32) - users.start, key[found] - columns.start, found + first
        row = (rows[columns] if rows.ndim == 1 else rows[users, columns]).cpu().numpy()
        wanted = cells_of(np.arange(users.start, users.stop)[:, None], row)
        if first == stop:
            return (np.zeros(0, np.int64),) * 3
        place = np.minimum(np.searchsorted(self.cell, wanted), len(self.cell) - 1)
        user, column = np.nonzero(self.cell[place] == wanted)
        return user, column, place[user, column]

    def of_items(self, rows: Int) -> NDArray[np.uint8]:
        """Codes uint8 [C, F + 1] of candidates int64 [C] for the first user (`of_pairs`)."""
        return self.of_pairs(np.zeros_like(rows), rows)

    def found_codes(self, user: Int, place: Int) -> NDArray[np.uint8]:
        """The `of_pairs` of counted pairs that `find` found: uint8 [n, F + 1].

        Args:
            user: int64 [n] from 0 to B - 1.
            place: int64 [n].
        """
        return self._with_event_counts(self.codes.codes[place], user)

    def counts(self, rows: Int) -> NDArray[np.float32]:
        """The decoded values of candidates for the first user, float32 [C, F]; NaN if they are not counted."""
        codes = self.of_items(rows)[:, :-1]
        values = decode_values(self.codes.spec, codes).astype(np.float32)
        values[codes[:, 0] == 0] = np.nan
        return values
