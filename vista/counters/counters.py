"""Counters quantized to 6 bits per value: what a record stores, and what the model reads in training and in serving.

N users, E counted keys of all users together, F values per key (`CounterSpec`), T new events.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.config.checks import MAX_DAYS
from vista.config.model_config import (
    ITEM,
    MAX_COUNTER_EVENTS,
    MAX_COUNTERS,
    MAX_HORIZONS,
    MIN_COUNTER_DAYS,
    NextItemConfig,
    counted_fields,
)
from vista.files import NUMBER, check_fields, list_of, one_of, text, whole
from vista.log.histories import DAY_MS, NO_TIMESTAMP, ranges

# What the counters of a store count: the fields, how many keys per user, and over which horizons.

STEPS_PER_EVENT = 1_000_000
"""Positions are scaled by this, so that half-lives in events are whole numbers of steps, as those in ms are."""


@dataclass(frozen=True, slots=True)
class CounterSpec:
    """Fields and horizons of counters. All users of a store share it.

    A *key* is what is counted: an item, or a value of another field (`vista.counters.keys`). Key 0 stands for an
    unknown item or for an item without a category, and is never counted. For each key of each user, counters hold F =
    2 + len(days) + len(events) columns:

    =============  =====================================================================================
    column         value
    =============  =====================================================================================
    0              number of events with this key in the complete history
    next len(days)    sum over these events of exp(-t/τ), with t the time since the event and τ = `days[j]` days
    next len(events)  sum over these events of exp(-n/τ), with n the number of later events and τ = `events[j]`
    last           age: time since the newest event with this key in s, or without times the number of later events
    =============  =====================================================================================
    """

    fields: tuple[str, ...] = (ITEM,)
    """What is counted (`model.counter_keys`); each field has counters of its own."""
    keys: tuple[int, ...] = (64,)
    """Keys per user and field in a record: the most frequent ones (`CounterTable.top`)."""
    days: tuple[float, ...] = (30.0,)
    """Time constants τ of the horizons in time, in days."""
    events: tuple[float, ...] = (200.0,)
    """Time constants τ of the horizons in events."""
    has_time: bool = True
    """Whether the log has times. If not, ages are numbers of events, and `days` is empty."""

    def __post_init__(self) -> None:
        """Check the values. Raises ValueError naming the field."""
        if not self.fields or len(set(self.fields)) < len(self.fields):
            raise ValueError(f"fields: must be distinct names, at least one, got {self.fields}")
        if len(self.keys) != len(self.fields):
            raise ValueError(f"keys: expected one number for each of {', '.join(self.fields)}, got {self.keys}")
        if not all(1 <= keys <= MAX_COUNTERS for keys in self.keys):
            raise ValueError(f"keys: must be from 1 to {MAX_COUNTERS}, got {self.keys}")
        if not all(MIN_COUNTER_DAYS <= days <= MAX_DAYS for days in self.days):
            raise ValueError(f"days: must be from 1/24 to {MAX_DAYS:g}, got {self.days}")
        if not all(1 <= events <= MAX_COUNTER_EVENTS for events in self.events):
            raise ValueError(f"events: must be from 1 to {MAX_COUNTER_EVENTS:g}, got {self.events}")
        if len(self.days) + len(self.events) > MAX_HORIZONS:
            raise ValueError(f"days, events: at most {MAX_HORIZONS} horizons in all, got {self.days} and {self.events}")
        if self.days and not self.has_time:
            raise ValueError(f"days: must be empty for a log without times, got {self.days}")

    @classmethod
    def of(cls, config: NextItemConfig, *, has_time: bool, actions: Sequence[str]) -> CounterSpec | None:
        """What a model counts; None for a model without counters.

        Args:
            config: with `counter_keys` null meaning none.
            has_time: whether its log has times; actions: their names.
        """
        if not config.counter_keys:
            return None
        fields, days = counted_fields(config.counter_keys, actions), config.counter_days if has_time else []
        horizons = tuple(map(float, days)), tuple(map(float, config.counter_events))
        return cls(fields, (config.num_counters,) * len(fields), *horizons, has_time)

    @property
    def num_fields(self) -> int:
        """G."""
        return len(self.fields)

    @property
    def num_horizons(self) -> int:
        """Number of decayed sums per key, len(days) + len(events)."""
        return len(self.days) + len(self.events)

    @property
    def num_columns(self) -> int:
        """F, the number of values per key: count, decayed sums, age."""
        return 2 + self.num_horizons

    @property
    def half_lives(self) -> Int:
        """Half-lives τ·ln 2 of the horizons: int64 [len(days) + len(events)], in ms and in millionths of an event.
        Whole numbers, so that the half-life that an event lies in is exact."""
        return _half_lives(self).copy()

    def decay(self, elapsed_ms: Int, num_events: Int) -> NDArray[np.float64]:
        """Weights of n events at a later time: float64 [n, len(days) + len(events)].

        Args:
            elapsed_ms: int64 [n] time since each event, at least 0.
            num_events: int64 [n] number of later events of the same user.
        """
        passed, half_lives = np.empty((len(elapsed_ms), self.num_horizons), np.int64), _half_lives(self)
        passed[:, : len(self.days)] = elapsed_ms[:, None]
        passed[:, len(self.days) :] = num_events[:, None] * STEPS_PER_EVENT
        weights: NDArray[np.float64] = np.exp2(-passed / half_lives)
        return weights

    def age(self, elapsed_ms: Int, num_events: Int) -> NDArray[np.float64]:
        """Ages of n events, in s or in events: float64 [n]. Arguments as in `decay`."""
        ages: NDArray[np.float64] = elapsed_ms / 1_000 if self.has_time else num_events.astype(np.float64)
        return ages

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, for manifests."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> CounterSpec:
        """The inverse of `to_dict`. Raises ValueError if a field is missing, unknown, or invalid; the message names
        it."""
        check_fields(fields, _RULES)
        days, events = (tuple(map(float, fields[name])) for name in ("days", "events"))
        return cls(tuple(fields["fields"]), tuple(fields["keys"]), days, events, fields["has_time"])


@lru_cache
def _half_lives(spec: CounterSpec) -> Int:
    scales = [days * DAY_MS for days in spec.days] + [events * STEPS_PER_EVENT for events in spec.events]
    return np.array([round(scale * math.log(2)) for scale in scales], np.int64)


_RULES = {
    "fields": list_of(text(), least=1),
    "keys": list_of(whole(1, MAX_COUNTERS)),
    "days": list_of(NUMBER),
    "events": list_of(NUMBER),
    "has_time": one_of(True, False),
}


CODE_BITS = 6
MAX_CODE = 2**CODE_BITS - 1
EVENTS_RESOLUTION, MAX_EVENTS = 10.0, 1e6
"""ε and n_max of `encode_event_counts`."""

_SECONDS_PER_DAY = 86_400


@lru_cache
def code_scales(spec: CounterSpec) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Resolution ε and largest value c_max of each column of `spec`: float64 [F] each.

    =====================  =======  ===================
    column                 ε        c_max
    =====================  =======  ===================
    count                  0.5      10,000
    sums over days         0.05     1,000
    sums over events       0.05     1/(1 − exp(−1/τ))
    age, in seconds        600      3,650 days
    age, in events         1        1,000,000
    =====================  =======  ===================

    No sum over events exceeds its c_max, about τ + 0.5.
    """
    days, events = len(spec.days), len(spec.events)
    age = (600.0, 3_650.0 * _SECONDS_PER_DAY) if spec.has_time else (1.0, 1e6)
    resolution = np.array([0.5, *[0.05] * (days + events), age[0]])
    largest_sums = -1 / np.expm1(-1 / np.array(spec.events))
    largest = np.array([10_000.0, *[1_000.0] * days, *largest_sums, age[1]])
    return resolution, largest


def encode_values(spec: CounterSpec, values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Quantize values [E, F] of at least 0 on a logarithmic scale: uint8 [E, F] from 0 to 63.

    code = round(63 · ln(1 + c/ε) / ln(1 + c_max/ε)), at most 63, with ε and c_max from `code_scales`. A count of at
    least 1 has a code of at least 7, so count code 0 marks an absent key.
    """
    return _codes(values, code_scales(spec)[0], _codes_per_log(spec))


def encode_event_counts(num_events: Int) -> NDArray[np.uint8]:
    """Quantize users' numbers of events int64 [n]: uint8 [n] from 0 to 63, in steps of about a fifth from 50 events on.

    code = round(63 · ln(1 + n/ε) / ln(1 + n_max/ε)), at most 63, with ε = `EVENTS_RESOLUTION` and n_max = `MAX_EVENTS`.
    """
    return _codes(num_events, EVENTS_RESOLUTION, _EVENT_CODES_PER_LOG)


_EVENT_CODES_PER_LOG = MAX_CODE / np.log1p(MAX_EVENTS / EVENTS_RESOLUTION)


@lru_cache
def _codes_per_log(spec: CounterSpec) -> NDArray[np.float64]:
    """float64 [F]."""
    resolution, largest = code_scales(spec)
    factors: NDArray[np.float64] = MAX_CODE / np.log1p(largest / resolution)
    return factors


def _codes(values: NDArray[Any], resolution: NDArray[np.float64] | float, factor: Any) -> NDArray[np.uint8]:
    levels = np.rint(np.log1p(values / resolution) * factor)
    codes: NDArray[np.uint8] = np.minimum(levels, MAX_CODE).astype(np.uint8)
    return codes


def decode_values(spec: CounterSpec, codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Values of codes [E, F]: float64 [E, F]; counts are rounded to whole numbers. Encoding the result gives the codes
    again, so advancing by no time and no events changes nothing."""
    values: NDArray[np.float64] = _levels(spec)[codes, np.arange(spec.num_columns)]
    return values


@lru_cache
def _levels(spec: CounterSpec) -> NDArray[np.float64]:
    """The value of each code: float64 [MAX_CODE + 1, F]."""
    resolution, largest = code_scales(spec)
    levels: NDArray[np.float64] = resolution * np.expm1(
        np.arange(MAX_CODE + 1)[:, None] * (np.log1p(largest / resolution) / MAX_CODE)
    )
    levels[:, 0] = np.rint(levels[:, 0])
    return levels


@dataclass(frozen=True, slots=True)
class CounterCodes:
    """Quantized counters of N users for one field, packed: users end to end, keys ascending per user."""

    spec: CounterSpec
    key: NDArray[np.int32]
    """[E] at least 1 (`vista.counters.keys`)."""
    codes: NDArray[np.uint8]
    """[E, F], from `encode_values`. codes / 63 is a logarithmic feature from 0 to 1."""
    offsets: Int
    """[N + 1]."""
    clock: Int
    """[N] the time to which sums and ages refer, ms: that of the newest event; `NO_TIMESTAMP` without events."""

    @property
    def owner(self) -> Int:
        """User of each key, 0 .. N - 1: int64 [E]."""
        return np.arange(len(self.clock)).repeat(self.offsets[1:] - self.offsets[:-1])

    def values(self) -> NDArray[np.float64]:
        """The decoded values, float64 [E, F], in the units of `CounterSpec`."""
        return decode_values(self.spec, self.codes)

    def advanced(self, now: Int | None, key: Int, time: Int, offsets: Int) -> CounterCodes:
        """The counters as of a request: decayed to `now`, with the events since then added.

        Decodes, adds, and encodes again. Always advance what was stored, with all new events at once: each call
        rounds. A user may have up to `spec.keys` + T keys afterwards.

        Args:
            now: int64 [N] request times in ms; an event after it has age 0. None for the time of the newest event.
            key: int [T] keys of the new events, oldest first per user. Key 0 is not counted, but it is an event.
            time: int64 [T] their times in ms; ignored without times.
            offsets: int64 [N + 1] of the users in key and time.
        """
        spec, counts = self.spec, np.diff(offsets)
        owner, new_owner = self.owner, np.repeat(np.arange(len(counts)), counts)
        if now is None:
            now = self.clock.copy()
            np.maximum.at(now, new_owner, time)
        old = self._values_at(now, counts)
        known = np.flatnonzero(key)
        elapsed, passed = np.maximum(now[new_owner] - time, 0), offsets[1:][new_owner] - 1 - np.arange(len(key))
        new = np.column_stack([np.ones(len(key)), spec.decay(elapsed, passed), spec.age(elapsed, passed)])[known]

        cells, place = np.unique(
            np.concatenate([cells_of(owner, self.key), cells_of(new_owner[known], key[known])]), return_inverse=True
        )
        added = np.concatenate([old, new])
        values = np.full((len(cells), spec.num_columns), np.inf)
        for column in range(spec.num_columns - 1):
            values[:, column] = np.bincount(place, added[:, column], len(cells))
        np.minimum.at(values[:, -1], place, added[:, -1])
        bounds = np.searchsorted(cells, cells_of(np.arange(len(counts) + 1), 0))
        return CounterCodes(spec, cells.astype(np.uint32).astype(np.int32), encode_values(spec, values), bounds, now)

    def decayed(self, now: Int | None) -> CounterCodes:
        """`advanced` without new events."""
        now = self.clock if now is None else now
        values = self._values_at(now, np.zeros(len(now), np.int64))
        return CounterCodes(self.spec, self.key, encode_values(self.spec, values), self.offsets, now)

    def _values_at(self, now: Int, passed: Int) -> NDArray[np.float64]:
        """The decoded values at times int64 [N], and after int64 [N] further events of the users: float64 [E, F]."""
        elapsed, counts = np.maximum(now - self.clock, 0), self.offsets[1:] - self.offsets[:-1]
        decay, age, values = self.spec.decay(elapsed, passed), self.spec.age(elapsed, passed), self.values()
        values[:, 1:-1] *= decay.repeat(counts, 0)
        values[:, -1] += age.repeat(counts)
        return values

    def lookup(self, user: Int, key: Int) -> NDArray[np.uint8]:
        """Codes of n pairs of user (0 .. N - 1) and key: uint8 [n, F]; zeros where the user has no such key."""
        return self.at_cells(cells_of(self.owner, self.key), cells_of(user, key))

    def at_cells(self, cells: Int, wanted: Int) -> NDArray[np.uint8]:
        """`lookup` of pairs as numbers: cells int64 [E] of all keys, and wanted int64 [n], from `cells_of`."""
        found = np.zeros((len(wanted), self.spec.num_columns), np.uint8)
        place = np.searchsorted(cells, wanted)
        inside = np.flatnonzero(place < len(cells))
        inside = inside[cells[place[inside]] == wanted[inside]]
        found[inside] = self.codes[place[inside]]
        return found

    def padded(self, size: int = 0) -> tuple[Int, NDArray[np.uint8]]:
        """Keys int64 [N, S], with -1 as padding, and codes uint8 [N, S, F], with zeros; S is the most keys per user, or
        `size` if that is more."""
        counts = np.diff(self.offsets)
        filled = np.arange(counts.max(initial=size)) < counts[:, None]
        key = np.full(filled.shape, -1, np.int64)
        key[filled] = self.key
        codes = np.zeros((*filled.shape, self.codes.shape[1]), np.uint8)
        codes[filled] = self.codes
        return key, codes

    def select(self, users: Int) -> CounterCodes:
        """Counters of these users, in this order; a user may appear several times."""
        counts = np.diff(self.offsets)[users]
        index = ranges(self.offsets[users], counts)
        bounds = offsets_of(counts)
        return CounterCodes(self.spec, self.key[index], self.codes[index], bounds, self.clock[users])

    @staticmethod
    def concatenated(parts: Sequence[CounterCodes]) -> CounterCodes:
        """The users of all parts, end to end; at least one part."""
        if len(parts) == 1:
            return parts[0]
        sizes = np.concatenate([np.diff(part.offsets) for part in parts])
        offsets = offsets_of(sizes)
        key, codes, clock = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("key", "codes", "clock")
        )
        return CounterCodes(parts[0].spec, key, codes, offsets, clock)


def cells_of(user: Int, key: NDArray[np.int32] | Int | int) -> Int:
    """Pairs of user and key as one number that sorts like the pair: int64 [n]."""
    return (user << 32) + key


# Exact counters of users: made from their histories, extended by new events, and quantized for records.
#
# N users, E counted keys of all users together, H horizons, F values per key (`CounterSpec`), T events.

# Exact counters of single keys, and how they add up event by event. E rows, H = len(days) + len(events) horizons.
#
# A decayed sum is kept relative to the half-life in which the key's newest event lies. With half-life h, an event at
# x = q·h + r, 0 ≤ r < h, adds 2^(r/h), and the sum before it is first multiplied by 2^(q' − q), where q' belongs to the
# event before. That factor is a power of two, so it rounds nothing. The sum therefore depends only on the events and
# their order, not on when they were added.

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


@dataclass(frozen=True, slots=True)
class CounterTable:
    """Exact counters of N users for one field, packed: users end to end, keys ascending per user. Events can be
    appended, but not removed: after a deletion or a late event, count the history again with `of`."""

    spec: CounterSpec
    rows: CounterRows
    """[E]."""
    offsets: Int
    """[N + 1]."""
    clock: Int
    """[N] time of the newest event, ms; NO_TIMESTAMP without events."""
    num_events: Int
    """[N] events of the history, including those with key 0."""

    @classmethod
    def of(cls, spec: CounterSpec, key: Int, time: Int, offsets: Int) -> CounterTable:
        """Count N histories.

        Args:
            spec: the horizons.
            key: int [T] keys of the events, oldest first per user. Key 0 is not counted, but it is an event.
            time: int64 [T] their times in ms; ordinals without times.
            offsets: int64 [N + 1] of the users in key and time.
        """
        none, num_events = np.zeros(0, np.int64), np.zeros(len(offsets) - 1, np.int64)
        rows = CounterRows(none, none, np.zeros((0, spec.num_horizons)), none, none)
        clock = np.full_like(num_events, NO_TIMESTAMP)
        return cls(spec, rows, np.zeros_like(offsets), clock, num_events).appended(key, time, offsets)

    def appended(self, key: Int, time: Int, offsets: Int) -> CounterTable:
        """The counters with newer events added: bit-identical to those of the longer histories.

        Args:
            key: int [T] keys of the new events, as in `of`.
            time: int64 [T] their times.
            offsets: int64 [N + 1] of the users in key and time.

        Raises:
            ValueError: a new event of a user is older than an earlier one; count that history again.
        """
        counts = np.diff(offsets)
        user = np.repeat(np.arange(len(counts)), counts)
        index = np.arange(len(key))
        position = index - offsets[user] + self.num_events[user]
        late = np.flatnonzero(time < np.where(index == offsets[user], self.clock[user], time[index - 1]))
        if len(late):
            raise ValueError(
                f"user {user[late[0]]}: the event at position {position[late[0]]} is older than the event before; sort "
                "the events by time, or count the whole history again"
            )
        known = np.flatnonzero(key)
        events = CounterRows.of_events(self.spec, np.asarray(key)[known].astype(np.int64), time[known], position[known])
        rows = CounterRows.concatenated([self.rows, events])
        owner, rows, is_newest = rows.added_up(self.spec, np.concatenate([self.owner, user[known]]))
        newest = np.flatnonzero(is_newest)
        clock = self.clock.copy()
        has_new = np.flatnonzero(counts)
        clock[has_new] = time[offsets[1:][has_new] - 1]
        return CounterTable(
            self.spec, rows[newest], offsets_of_owners(owner[newest], len(counts)), clock, self.num_events + counts
        )

    @property
    def owner(self) -> Int:
        """User of each row, 0 .. N - 1: int64 [E]."""
        return np.repeat(np.arange(len(self.clock)), np.diff(self.offsets))

    def values(self) -> NDArray[np.float64]:
        """Values as of each user's newest event: float64 [E, F], with the columns of `CounterSpec`."""
        now, num_events = self.clock[self.owner], self.num_events[self.owner]
        age = self.spec.age(now - self.rows.last, num_events - 1 - self.rows.last_position)
        return np.column_stack([self.rows.count, self.rows.sums(self.spec, now, num_events), age])

    def top(self, num_keys: int) -> CounterTable:
        """Only the `num_keys` keys per user with the highest counts; of equal counts, the most recent ones."""
        owner = self.owner
        order = np.lexsort((-self.rows.last_position, -self.rows.count, owner))
        rank = np.arange(len(order)) - self.offsets[owner]
        kept = np.sort(order[rank < num_keys])
        offsets = offsets_of_owners(owner[kept], len(self.clock))
        return CounterTable(self.spec, self.rows[kept], offsets, self.clock, self.num_events)

    def codes(self) -> CounterCodes:
        """The counters quantized, as of each user's newest event. Take the `top` ones first."""
        codes = encode_values(self.spec, self.values())
        return CounterCodes(self.spec, self.rows.key.astype(np.int32), codes, self.offsets, self.clock)

    def select(self, users: Int) -> CounterTable:
        """Counters of these users, in this order; a user may appear several times."""
        counts = np.diff(self.offsets)[users]
        rows = self.rows[ranges(self.offsets[users], counts)]
        offsets = offsets_of(counts)
        return CounterTable(self.spec, rows, offsets, self.clock[users], self.num_events[users])

    @staticmethod
    def concatenated(parts: Sequence[CounterTable]) -> CounterTable:
        """The users of all parts, end to end; at least one part."""
        rows = CounterRows.concatenated([part.rows for part in parts])
        sizes = np.concatenate([np.diff(part.offsets) for part in parts])
        offsets = offsets_of(sizes)
        clock, num_events = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("clock", "num_events")
        )
        return CounterTable(parts[0].spec, rows, offsets, clock, num_events)


def offsets_of_owners(owner: Int, num_users: int) -> Int:
    """Offsets [N + 1] of packed rows with ascending owners."""
    return np.searchsorted(owner, np.arange(num_users + 1))


# Counters at any positions of histories, for training, where one history is cut at many points.
#
# N users, T events, n cuts.


class OccurrenceIndex:
    """Counters of N histories for one field, after each of their events. `table` is bit-identical to `CounterTable.of`
    on the events before the cut, but costs one pass of comparisons."""

    def __init__(self, spec: CounterSpec, key: Int, time: Int, offsets: Int) -> None:
        """Index N histories; arguments as in `CounterTable.of`."""
        self._spec, self._time, self._offsets = spec, time, offsets
        counts = np.diff(offsets)
        user = np.repeat(np.arange(len(counts)), counts)
        known = np.flatnonzero(key)
        position = known - offsets[user[known]]
        events = CounterRows.of_events(spec, np.asarray(key)[known].astype(np.int64), time[known], position)
        owner, self._rows, is_newest = events.added_up(spec, user[known])
        self._bounds = offsets_of_owners(owner, len(counts))
        self._next_position = np.append(self._rows.last_position[1:], 0)
        """[rows] position of the next event with the same key."""
        self._next_position[is_newest] = np.iinfo(np.int64).max

    def table(self, user: Int, position: Int) -> CounterTable:
        """Counters over the first position[i] events of user[i], for each cut: N = n.

        Args:
            user: int64 [n] from 0.
            position: int64 [n] from 0 to the number of events of the user.
        """
        newest, counts = [], np.zeros(len(user), np.int64)
        for cut, (start, stop, end) in enumerate(
            zip(self._bounds[user].tolist(), self._bounds[user + 1].tolist(), position.tolist(), strict=True)
        ):
            before = self._rows.last_position[start:stop] < end
            before &= self._next_position[start:stop] >= end
            found = np.flatnonzero(before)
            newest.append(found + start)
            counts[cut] = len(found)
        rows = self._rows[np.concatenate([np.zeros(0, np.int64), *newest])]
        offsets = offsets_of(counts)
        has_events = np.flatnonzero(position)
        clock = np.full(len(user), NO_TIMESTAMP)
        clock[has_events] = self._time[self._offsets[user[has_events]] + position[has_events] - 1]
        return CounterTable(self._spec, rows, offsets, clock, position)
