"""The summaries of a batch of users, and everything else that their records hold, before encoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.counters.counter_codes import CounterCodes
from vista.store.format.state_record import StateArrays
from vista.store.tail import Tail


@dataclass(frozen=True, slots=True, kw_only=True)
class UserSummaries:
    """Everything that the records and states of N users hold, before encoding."""

    keys: list[bytes]
    """N keys from `vista.store.format.keys.user_keys`."""
    summary: NDArray[np.float32]
    """[N, K, d]."""
    tail: Tail
    """The last events of the N users, items as rows of the model."""
    event_count: NDArray[np.int64]
    """[N] events that each record covers."""
    last_event_ts: NDArray[np.int64]
    """[N] time of the newest of these events; NO_TIMESTAMP without events."""
    history_digest: NDArray[np.uint64]
    """[N] digests of these events, from `vista.store.format.digest.history_digests`."""
    counters: tuple[CounterCodes, ...] = ()
    """The counters of the N users, one for each field; empty if the model has no counters."""
    features: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Of the N users, [N] by name: the model's codes int32, -1 for a missing value, or float32 numbers, NaN for a
    missing one."""
    states: StateArrays | None = None
    """The states of the N users; None if the store keeps no states."""

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, row: int) -> UserSummaries:
        """The summary of one user (N = 1)."""
        one = slice(row, row + 1)
        return UserSummaries(
            keys=self.keys[one],
            summary=self.summary[one],
            tail=self.tail.of_user(row),
            event_count=self.event_count[one],
            last_event_ts=self.last_event_ts[one],
            history_digest=self.history_digest[one],
            counters=tuple(one.select(np.array([row])) for one in self.counters),
            features={name: values[one] for name, values in self.features.items()},
            states=None if self.states is None else self.states[one],
        )
