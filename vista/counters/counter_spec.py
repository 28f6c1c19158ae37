"""What the counters of a store count: the fields, how many keys per user, and over which horizons."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
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
from vista.log.gaps import DAY_MS

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
