"""Counters quantized to 6 bits per value: what a record stores, and what the model reads in training and in serving.

N users, E counted keys of all users together, F values per key (`CounterSpec`), T new events.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.config.checks import MAX_DAYS
from vista.config.model_config import (
    ITEM,
    MAX_COUNTER_EVENTS,
    MAX_COUNTER_KEYS,
    MAX_HORIZONS,
    MIN_COUNTER_DAYS,
    ModelConfig,
)
from vista.json_fields import NUMBER, check_fields, list_of, one_of, text, whole
from vista.log.histories import DAY_MS, ranges

# What the counters of a store count: the fields, how many keys per user, and over which horizons.

STEPS_PER_EVENT = 1_000_000
"""Positions are scaled by this, so that half-lives in events are whole numbers of steps, as those in ms are."""


@dataclass(frozen=True, slots=True)
class CounterSpec:
    """Fields and horizons of counters. All users of a store share it.

    A *key* is what is counted: an item, or a category of items. Key 0 stands for an unknown item or for an item without
    a category, and is never counted. For each key of each user, counters hold F = 2 + len(days) + len(events) columns:

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
    """What is counted; each field has counters of its own."""
    keys: tuple[int, ...] = (64,)
    """Keys per user and field in a record: the most frequent ones (`CounterTable.top`)."""
    days: tuple[float, ...] = (30.0,)
    """Time constants τ of the horizons in time, in days."""
    events: tuple[float, ...] = (200.0,)
    """Time constants τ of the horizons in events."""
    has_time: bool = True
    """Whether the log has times. If not, ages are numbers of events, and `days` is empty."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: naming the field.
        """
        if not self.fields or len(set(self.fields)) < len(self.fields):
            raise ValueError(f"fields: must be distinct names, at least one, got {self.fields}")
        if len(self.keys) != len(self.fields):
            raise ValueError(f"keys: expected one number for each of {', '.join(self.fields)}, got {self.keys}")
        if not all(1 <= keys <= MAX_COUNTER_KEYS for keys in self.keys):
            raise ValueError(f"keys: must be from 1 to {MAX_COUNTER_KEYS}, got {self.keys}")
        if not all(MIN_COUNTER_DAYS <= days <= MAX_DAYS for days in self.days):
            raise ValueError(f"days: must be from 1/24 to {MAX_DAYS:g}, got {self.days}")
        if not all(1 <= events <= MAX_COUNTER_EVENTS for events in self.events):
            raise ValueError(f"events: must be from 1 to {MAX_COUNTER_EVENTS:g}, got {self.events}")
        if len(self.days) + len(self.events) > MAX_HORIZONS:
            raise ValueError(f"days, events: at most {MAX_HORIZONS} horizons in all, got {self.days} and {self.events}")
        if self.days and not self.has_time:
            raise ValueError(f"days: must be empty for a log without times, got {self.days}")

    @classmethod
    def of(cls, config: ModelConfig, *, has_time: bool) -> CounterSpec | None:
        """What a model counts; None for a model without counters.

        Args:
            config: with `counters` null meaning false.
            has_time: whether its log has times.
        """
        if not config.counters:
            return None
        fields, days = (ITEM, *config.counter_categories), config.counter_days if has_time else []
        horizons = tuple(map(float, days)), tuple(map(float, config.counter_events))
        return cls(fields, (config.counter_keys,) * len(fields), *horizons, has_time)

    @property
    def num_fields(self) -> int:
        """G, what is counted: items, and categories of items."""
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

        Whole numbers, so that the half-life that an event lies in is exact.
        """
        scales = [days * DAY_MS for days in self.days] + [events * STEPS_PER_EVENT for events in self.events]
        return np.array([round(scale * math.log(2)) for scale in scales], np.int64)

    def decay(self, elapsed_ms: Int, num_events: Int) -> NDArray[np.float64]:
        """Weights of n events at a later time: float64 [n, len(days) + len(events)].

        Args:
            elapsed_ms: int64 [n] time since each event, at least 0.
            num_events: int64 [n] number of later events of the same user.
        """
        passed = np.repeat(
            np.stack([elapsed_ms, num_events * STEPS_PER_EVENT], 1), [len(self.days), len(self.events)], axis=1
        )
        weights: NDArray[np.float64] = np.exp2(-passed / self.half_lives)
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
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing, unknown, or invalid; the message names it.
        """
        check_fields(fields, _RULES)
        days, events = (tuple(map(float, fields[name])) for name in ("days", "events"))
        return cls(tuple(fields["fields"]), tuple(fields["keys"]), days, events, fields["has_time"])


_RULES = {
    "fields": list_of(text(), least=1),
    "keys": list_of(whole(1, MAX_COUNTER_KEYS)),
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
    return _codes(values, *code_scales(spec))


def encode_event_counts(num_events: Int) -> NDArray[np.uint8]:
    """Quantize users' numbers of events int64 [n]: uint8 [n] from 0 to 63, in steps of about a fifth from 50 events on.

    code = round(63 · ln(1 + n/ε) / ln(1 + n_max/ε)), at most 63, with ε = `EVENTS_RESOLUTION` and n_max = `MAX_EVENTS`.
    """
    return _codes(num_events, EVENTS_RESOLUTION, MAX_EVENTS)


def _codes(values: NDArray[Any], resolution: NDArray[np.float64] | float, largest: Any) -> NDArray[np.uint8]:
    levels = np.rint(np.log1p(values / resolution) * (MAX_CODE / np.log1p(largest / resolution)))
    codes: NDArray[np.uint8] = np.minimum(levels, MAX_CODE).astype(np.uint8)
    return codes


def decode_values(spec: CounterSpec, codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Values of codes [E, F]: float64 [E, F]; counts are rounded to whole numbers.

    Encoding the result gives the codes again, so advancing by no time and no events changes nothing.
    """
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
    """[E] item rows of the model, or codes of a category plus 1; at least 1."""
    codes: NDArray[np.uint8]
    """[E, F], from `encode_values`. codes / 63 is a logarithmic feature from 0 to 1."""
    offsets: Int
    """[N + 1]."""
    clock: Int
    """[N] the time to which sums and ages refer, ms: that of the newest event; `NO_TIMESTAMP` without events."""

    @property
    def owner(self) -> Int:
        """User of each key, 0 .. N - 1: int64 [E]."""
        return np.repeat(np.arange(len(self.clock)), np.diff(self.offsets))

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
        old = self.values()
        elapsed, passed = np.maximum(now[owner] - self.clock[owner], 0), counts[owner]
        old[:, 1:-1] *= spec.decay(elapsed, passed)
        old[:, -1] += spec.age(elapsed, passed)
        if not len(key):
            return CounterCodes(spec, self.key, encode_values(spec, old), self.offsets, now)

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


@dataclass(frozen=True, slots=True)
class ItemKeys:
    """The keys of a model's items in each field of a spec, whose first field is `item`.

    R model rows, G fields.
    """

    spec: CounterSpec
    category: NDArray[np.int32]
    """[G - 1, R] the key of each model row in the fields after `item`; 0 for an item without a value."""

    def of(self, rows: Int) -> list[Int]:
        """Keys of model rows int64 [...] in each of the G fields, int64 [...]; first the rows themselves."""
        return [rows, *(category[rows].astype(np.int64) for category in self.category)]
