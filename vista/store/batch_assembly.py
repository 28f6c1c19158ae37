"""A batch of users put together from records that were read in several transactions, or from several shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.counters.counter_codes import CounterCodes
from vista.log.gaps import NO_TIMESTAMP
from vista.store.format.record import RawRecords, decode_rows
from vista.store.format.record_spec import RecordSpec
from vista.store.stored_batch import StoredBatch
from vista.store.tail import Tail


def assembled(num_users: int, parts: Sequence[tuple[NDArray[np.int64], RawRecords]], spec: RecordSpec) -> StoredBatch:
    """The batch of B = `num_users` users.

    Args:
        num_users: B.
        parts: positions in the batch, ascending, and the records of the users there; at least one part.
        spec: what the records share.
    """
    rows = _join([positions for positions, _ in parts])
    headers = _join([raw.headers for _, raw in parts])
    if len(parts) == 1 and len(rows) == num_users:
        summary = decode_rows(parts[0][1], spec)
    else:
        summary = np.zeros((num_users, spec.num_tokens, spec.dim), dtype=np.float32)
        for positions, raw in parts:
            summary[positions] = decode_rows(raw, spec)

    def spread(values: NDArray[Any], missing: int, dtype: Any = np.int64) -> NDArray[Any]:
        column = np.full(num_users, missing, dtype=dtype)
        column[rows] = values
        return column

    def spread_offsets(lengths: NDArray[Any]) -> NDArray[np.int64]:
        offsets = np.zeros(num_users + 1, dtype=np.int64)
        np.cumsum(spread(lengths, 0), out=offsets[1:])
        return offsets

    tails = [raw.tail for _, raw in parts]
    counters = [
        CounterCodes(
            one.spec,
            one.key,
            one.codes,
            spread_offsets(np.diff(one.offsets)),
            spread(headers["last_event_ts"], NO_TIMESTAMP),
        )
        for one in map(CounterCodes.concatenated, zip(*(raw.counters for _, raw in parts), strict=True))
    ]
    return StoredBatch(
        found=spread(np.ones(len(rows)), False, np.bool_),
        summary=summary,
        tail=Tail(
            _join([tail.items for tail in tails]),
            _join([tail.times for tail in tails]),
            _join([tail.actions for tail in tails]),
            spread_offsets(headers["tail_length"]),
        ),
        event_count=spread(headers["event_count"], 0),
        last_event_ts=spread(headers["last_event_ts"], NO_TIMESTAMP),
        created_at=spread(headers["created_at"], NO_TIMESTAMP),
        history_digest=spread(headers["history_digest"], 0, np.uint64),
        counters=tuple(counters),
    )


def _join(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
