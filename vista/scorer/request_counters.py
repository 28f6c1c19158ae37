"""Counters of a request's users, as of the request, and where they hold candidates.

Letters: B users, E counted items of all users together, G fields, F values per key (`CounterSpec`), C candidates, n
counted pairs of user and candidate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Int
from vista.counters.counter_codes import CounterCodes, ItemKeys, cells_of, decode_values
from vista.counters.counter_table import UserCounters
from vista.store.stored_batch import StoredBatch
from vista.store.tail import Tail


@dataclass(frozen=True, slots=True)
class RequestCounters(UserCounters):
    """Counters of B users with E counted items, and where to find them."""

    cells: tuple[Int, ...]
    """int64 [E] user and key as one number, ascending, of items and of each category."""

    @classmethod
    def of(
        cls, keys: ItemKeys, stored: StoredBatch, tail: Tail, is_fresh: NDArray[np.bool_], now: Int | None
    ) -> RequestCounters:
        """The stored counters, with the fresh events of the tail added, which the records do not cover.

        Training and evaluation on raw histories advance counters by the same function
        (`vista.examples.chunks`).

        Args:
            keys: of the model.
            stored: of a store with counters; users without a record have none.
            tail: of the request, with items as model rows. Fresh events that are no longer in it are not counted.
            is_fresh: bool [T] its events that the records do not cover.
            now: int64 [B] ms, or None if unknown.
        """
        fresh = np.flatnonzero(is_fresh)
        offsets = np.searchsorted(fresh, tail.offsets)
        codes, *categories = [
            counted.advanced(now, key, tail.times[fresh], offsets)
            for counted, key in zip(stored.counters, keys.of(tail.items[fresh].astype(np.int64)), strict=True)
        ]
        return cls._made_of(codes, stored.event_count + np.diff(offsets), tuple(categories), keys)

    @classmethod
    def _made_of(
        cls, codes: CounterCodes, num_events: Int, categories: tuple[CounterCodes, ...], keys: ItemKeys
    ) -> RequestCounters:
        cells = tuple(cells_of(one.owner, one.key) for one in (codes, *categories))
        return cls(codes, num_events, categories, keys, cells)

    def select(self, users: slice | Int) -> RequestCounters:
        """Counters of some of the users, or of all of them in another order."""
        index = np.arange(len(self.num_events))[users]
        categories = tuple(one.select(index) for one in self.categories)
        return self._made_of(self.codes.select(index), self.num_events[index], categories, self.keys)

    def find(self, users: slice, rows: Tensor | None, columns: slice) -> tuple[Int, Int, Int]:
        """The counted items in a rectangle of users and columns: user and column within it, and place in `codes`.

        Args:
            users: some of the B users.
            rows: int64 model rows of the candidates, [C] or [B, C]; None for the rows 0 to V.
            columns: some of the candidates.

        Returns:
            int64 [n] each.
        """
        cell = self.cells[0]
        first, stop = self.codes.offsets[[users.start, users.stop]].tolist()
        if rows is None:
            key = self.codes.key[first:stop].astype(np.int64)
            found = np.flatnonzero((key >= columns.start) & (key < columns.stop))
            return (cell[first:stop][found] >> 32) - users.start, key[found] - columns.start, found + first
        row = _rectangle(rows, users, columns)
        wanted = cells_of(np.arange(users.start, users.stop)[:, None], row)
        if first == stop:
            return (np.zeros(0, np.int64),) * 3
        place = np.minimum(np.searchsorted(cell, wanted), len(cell) - 1)
        user, column = np.nonzero(cell[place] == wanted)
        return user, column, place[user, column]

    def counted_pairs(self, users: slice, rows: Tensor | None, columns: slice) -> tuple[Int, Int, NDArray[np.uint8]]:
        """The candidates in a rectangle of which the item or a category is counted: user and column within it, int64
        [n] each, and their codes uint8 [n, G * F + 1] (`of_pairs`). Arguments are those of `find`."""
        if not self.categories:
            user, column, place = self.find(users, rows, columns)
            return user, column, self._with_event_counts(self.codes.codes[place], users.start + user)
        if rows is None:
            row = np.arange(columns.start, min(columns.stop, self.keys.category.shape[1]))
        else:
            row = _rectangle(rows, users, columns)
        count = users.stop - users.start
        row = np.broadcast_to(row, (count, row.shape[-1])).ravel()
        owner = np.repeat(np.arange(users.start, users.stop), len(row) // count)
        fields = zip((self.codes, *self.categories), self.cells, self.keys.of(row), strict=True)
        codes = np.concatenate([one.at_cells(cells, cells_of(owner, key)) for one, cells, key in fields], 1)
        found = np.flatnonzero(codes[:, :: self.codes.spec.num_columns].any(1))
        user, column = np.divmod(found, len(row) // count)
        return user, column, self._with_event_counts(codes[found], owner[found])

    def of_items(self, rows: Int) -> NDArray[np.uint8]:
        """Codes uint8 [C, G * F + 1] of candidates int64 [C] for the first user (`of_pairs`)."""
        return self.of_pairs(np.zeros_like(rows), rows)

    def counts(self, rows: Int) -> NDArray[np.float32]:
        """The decoded values of candidates for the first user, float32 [C, G * F]; NaN where a field does not count
        them."""
        spec, codes = self.codes.spec, self.of_items(rows)[:, :-1]
        by_field = codes.reshape(-1, spec.num_columns)
        values = decode_values(spec, by_field).astype(np.float32)
        values[by_field[:, 0] == 0] = np.nan
        return values.reshape(codes.shape)


def _rectangle(rows: Tensor, users: slice, columns: slice) -> Int:
    """Rows of candidates, [C] or [B, C], of some users and columns: int64 [columns] or [users, columns]."""
    part: Int = (rows[columns] if rows.ndim == 1 else rows[users, columns]).cpu().numpy()
    return part
