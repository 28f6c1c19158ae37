"""What a store returns for a batch of B users. K summary tokens, d model width."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import offsets_of
from vista.counters.counter_codes import CounterCodes
from vista.log.histories import NO_TIMESTAMP
from vista.store.tail import Tail

CLOCK_SKEW_MS = 300_000
"""A record dated further ahead was written by a wrong clock, so its age is unknown."""


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """Records of B users, in the order of the request."""

    found: NDArray[np.bool_]
    """[B]; False for users without a record."""
    summary: NDArray[np.float32]
    """[B, K, d]; zeros if not found."""
    tail: Tail
    """Tails as of the refresh; empty if not found."""
    event_count: NDArray[np.int64]
    """[B] events that the record covers; 0 if not found."""
    last_event_ts: NDArray[np.int64]
    """[B] ms; NO_TIMESTAMP if not found or without events."""
    created_at: NDArray[np.int64]
    """[B] start of the refresh, ms; NO_TIMESTAMP if not found."""
    history_digest: NDArray[np.uint64]
    """[B]; 0 if not found."""
    generation: int
    """Number of the store's generation that was read; of a sharded store, the oldest one."""
    features: dict[str, NDArray[Any]] = dataclasses.field(default_factory=dict)
    """Of the users, [B] by name: the model's codes int32, or float32 numbers; -1 or NaN if missing, or not found."""
    counters: tuple[CounterCodes, ...] = ()
    """Counters as of the refresh, one per field of their spec; without keys if not found. Empty if the store keeps no
    counters."""

    def expired(self, now_ms: int, refreshed_at: int, max_age_ms: int) -> NDArray[np.bool_]:
        """Whether each user's record is older than `max_age_ms`, or dated in the future, [B].

        Args:
            now_ms: the current time.
            refreshed_at: of the manifest; a user without new events is as current as the last refresh.
            max_age_ms: the limit; a record of exactly this age is not expired.
        """
        age = now_ms - np.maximum(self.created_at, refreshed_at)
        return self.found & ((age > max_age_ms) | (age < -CLOCK_SKEW_MS))

    def spread(self, rows: NDArray[np.int64], num_users: int) -> StoredBatch:
        """A batch of `num_users` with these records at `rows` (ascending), and no records elsewhere."""

        def column(values: NDArray[Any], missing: float = 0) -> NDArray[Any]:
            spread = np.full((num_users, *values.shape[1:]), missing, values.dtype)
            spread[rows] = values
            return spread

        def spread_offsets(offsets: NDArray[np.int64]) -> NDArray[np.int64]:
            return offsets_of(column(np.diff(offsets)))

        return StoredBatch(
            found=column(self.found),
            summary=column(self.summary),
            tail=dataclasses.replace(self.tail, offsets=spread_offsets(self.tail.offsets)),
            event_count=column(self.event_count),
            last_event_ts=column(self.last_event_ts, NO_TIMESTAMP),
            created_at=column(self.created_at, NO_TIMESTAMP),
            history_digest=column(self.history_digest),
            generation=self.generation,
            features={name: column(values, _missing(values)) for name, values in self.features.items()},
            counters=tuple(
                dataclasses.replace(one, offsets=spread_offsets(one.offsets), clock=column(one.clock, NO_TIMESTAMP))
                for one in self.counters
            ),
        )

    def without(self, users: NDArray[np.bool_]) -> StoredBatch:
        """The same batch, as if the marked users [B] had no record."""
        if not users.any():
            return self

        def remaining(offsets: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
            """Which entries stay, and their offsets."""
            lengths = np.diff(offsets)
            return np.repeat(~users, lengths), offsets_of(np.where(users, 0, lengths))

        def cleared(values: NDArray[Any], missing: float) -> NDArray[Any]:
            return np.where(users.reshape(-1, *[1] * (values.ndim - 1)), values.dtype.type(missing), values)

        kept, offsets = remaining(self.tail.offsets)
        counters = []
        for one in self.counters:
            kept_keys, key_offsets = remaining(one.offsets)
            counters.append(
                CounterCodes(
                    one.spec, one.key[kept_keys], one.codes[kept_keys], key_offsets, cleared(one.clock, NO_TIMESTAMP)
                )
            )
        return StoredBatch(
            found=self.found & ~users,
            summary=cleared(self.summary, 0),
            tail=self.tail.select(kept, offsets),
            event_count=cleared(self.event_count, 0),
            last_event_ts=cleared(self.last_event_ts, NO_TIMESTAMP),
            created_at=cleared(self.created_at, NO_TIMESTAMP),
            history_digest=cleared(self.history_digest, 0),
            generation=self.generation,
            features={name: cleared(values, _missing(values)) for name, values in self.features.items()},
            counters=tuple(counters),
        )


def _missing(values: NDArray[Any]) -> float:
    """How a column of features says that a value is missing."""
    return np.nan if values.dtype.kind == "f" else -1
