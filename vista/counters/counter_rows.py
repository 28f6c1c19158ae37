"""Exact counters of single keys, and how they add up event by event. E rows, H = len(days) + len(events) horizons.

A decayed sum is kept relative to the half-life in which the key's newest event lies. With half-life h, an event at
x = q·h + r, 0 ≤ r < h, adds 2^(r/h), and the sum before it is first multiplied by 2^(q' − q), where q' belongs to the
event before. That factor is a power of two, so it rounds nothing. The sum therefore depends only on the events and
their order, not on when they were added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.counters.counter_codes import cells_of
from vista.counters.counter_spec import STEPS_PER_EVENT, CounterSpec

_FEW_KEYS = 8
"""At most this many keys are added up one after another: that is faster than a NumPy call for every event."""


@dataclass(frozen=True, slots=True)
class CounterRows:
    """Counters of E pairs of user and key."""

    key: Int
    """[E] at least 1."""
    count: Int
    """[E] number of events with this key."""
    decayed: NDArray[np.float64]
    """[E, H] sums relative to the half-life of the newest event: at least 1, below 2 · count."""
    last: Int
    """[E] time of the newest event with this key, ms."""
    last_position: Int
    """[E] its position in the user's history, from 0."""

    def __getitem__(self, index: Int) -> CounterRows:
        return CounterRows(*(getattr(self, field.name)[index] for field in fields(self)))

    @staticmethod
    def concatenated(parts: Sequence[CounterRows]) -> CounterRows:
        """The rows of all parts, end to end."""
        names = [field.name for field in fields(CounterRows)]
        return CounterRows(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    @staticmethod
    def of_events(spec: CounterSpec, key: Int, time: Int, position: Int) -> CounterRows:
        """One row per event: int64 [E] keys, times in ms, and positions in the user's history."""
        rows = CounterRows(key, np.ones_like(key), np.empty((len(key), spec.num_horizons)), time, position)
        for column, half_life in enumerate(spec.half_lives.tolist()):
            place = rows._place(spec, column)
            np.exp2((place - place // half_life * half_life) / half_life, out=rows.decayed[:, column])
        return rows

    def sums(self, spec: CounterSpec, now: Int, num_events: Int) -> NDArray[np.float64]:
        """The decayed sums as of the time `now` [E], in ms, and after `num_events` [E] events: float64 [E, H]."""
        sums = np.empty_like(self.decayed)
        for column, half_life in enumerate(spec.half_lives.tolist()):
            start = self._place(spec, column) // half_life * half_life
            at = now if column < len(spec.days) else (num_events - 1) * STEPS_PER_EVENT
            sums[:, column] = self.decayed[:, column] * np.exp2((start - at) / half_life)
        return sums

    def added_up(self, spec: CounterSpec, user: Int) -> tuple[Int, CounterRows, NDArray[np.bool_]]:
        """Sort by user and key, and add to each row all earlier rows of the same user and key.

        Args:
            spec: the horizons.
            user: int64 [E] user of each row, from 0. Rows of the same user and key are in the order of their events.

        Returns:
            user int64 [E]; the rows, each with the sums up to it; and bool [E], True for the newest row of its key.
        """
        cell = cells_of(user, self.key)
        order = np.argsort(cell, kind="stable")
        cell, rows = cell[order], self[order]
        is_first = np.ones(len(cell), np.bool_)
        np.not_equal(cell[1:], cell[:-1], out=is_first[1:])
        starts = np.flatnonzero(is_first)
        sizes = np.diff(starts, append=len(cell))

        total = np.cumsum(rows.count)
        rows.count[:] = total - np.repeat(total[starts] - rows.count[starts], sizes)
        factor = np.zeros_like(rows.decayed)
        for column, half_life in enumerate(spec.half_lives.tolist()):
            number = rows._place(spec, column) // half_life
            factor[1:, column] = np.ldexp(1.0, np.minimum(number[:-1] - number[1:], 0))
        _add_up(rows.decayed, factor, starts, sizes)
        return user[order], rows, np.append(is_first[1:], True)[: len(cell)]

    def _place(self, spec: CounterSpec, column: int) -> Int:
        """Where the newest event lies on the scale of a horizon, in the units of `CounterSpec.half_lives`."""
        return self.last if column < len(spec.days) else self.last_position * STEPS_PER_EVENT


def _add_up(sums: NDArray[np.float64], factor: NDArray[np.float64], starts: Int, sizes: Int) -> None:
    """sums[i] += factor[i] · sums[i − 1] within each group, in place, one event of all groups at a time.

    Args:
        sums: [E, H], of which the sums are made.
        factor: [E, H].
        starts: [G] first row of each group.
        sizes: [G] rows per group.
    """
    by_size = np.argsort(-sizes, kind="stable")
    starts, sizes = starts[by_size], sizes[by_size]
    num_longer = np.searchsorted(-sizes, -np.arange(sizes.max(initial=0)), side="left")
    steps = max(int(np.count_nonzero(num_longer > _FEW_KEYS)), 1)
    for step in range(1, steps):
        row = starts[: num_longer[step]] + step
        sums[row] += factor[row] * sums[row - 1]
    for start, size in zip(starts[sizes > steps].tolist(), sizes[sizes > steps].tolist(), strict=True):
        rest = slice(start + steps, start + size)
        for column in range(sums.shape[1]):
            total, totals = float(sums[start + steps - 1, column]), []
            for scale, term in zip(factor[rest, column].tolist(), sums[rest, column].tolist(), strict=True):
                total = scale * total + term
                totals.append(total)
            sums[rest, column] = totals
