"""Counters of users as of requests: what models read. Letters: B users."""

from __future__ import annotations

from dataclasses import dataclass

from vista.arrays import Int
from vista.counters.counter_codes import CounterCodes


@dataclass(frozen=True, slots=True)
class UserCounters:
    """Counters of B users, each as of a request."""

    codes: CounterCodes
    """Of the items, advanced to the requests."""
    num_events: Int
    """int64 [B] events that they cover: those of the record, and the newer ones that were added."""
