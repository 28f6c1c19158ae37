"""A batch of users put together from records that were read in several transactions, or from several shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.counters.counter_codes import CounterCodes
from vista.store.format.record import RawRecords, decode_rows, read_records
from vista.store.format.record_spec import RecordSpec
from vista.store.stored_batch import StoredBatch
from vista.store.tail import Tail


def present_records(
    values: Sequence[bytes | memoryview | None], keys: list[bytes], first: int, spec: RecordSpec
) -> tuple[Int, RawRecords]:
    """Positions of the values that are not None, counted from `first`, and the records that they hold, checked."""
    present = [value for value in values if value is not None]
    if len(present) == len(keys):
        return first + np.arange(len(keys)), read_records(present, keys, spec)
    rows = [row for row, value in enumerate(values) if value is not None]
    return first + np.array(rows, np.int64), read_records(present, [keys[row] for row in rows], spec)


def assembled(num_users: int, parts: Sequence[tuple[Int, RawRecords]], spec: RecordSpec) -> StoredBatch:
    """The batch of B = `num_users` users.

    Args:
        num_users: B.
        parts: positions in the batch, ascending, and the records of the users there; at least one part.
        spec: what the records share.
    """
    rows, headers = _join([positions for positions, _ in parts]), _join([raw.headers for _, raw in parts])
    is_complete = len(rows) == num_users
    if is_complete and len(parts) == 1:
        summary = decode_rows(parts[0][1], spec)
    else:
        summary = np.zeros((num_users, spec.num_tokens, spec.dim), np.float32)
        for positions, raw in parts:
            summary[positions] = decode_rows(raw, spec)
    event_count, last_event_ts, created_at = (
        headers[name].astype(np.int64) for name in ("event_count", "last_event_ts", "created_at")
    )
    found = StoredBatch(
        found=np.ones(len(rows), np.bool_),
        summary=np.empty((len(rows), 0, spec.dim), np.float32),  # the large part, which is already in its place
        tail=Tail.concatenated([raw.tail for _, raw in parts]),
        event_count=event_count,
        last_event_ts=last_event_ts,
        created_at=created_at,
        history_digest=headers["history_digest"].astype(np.uint64),
        generation=spec.generation,
        features={name: _join([raw.features[name] for _, raw in parts]) for name in parts[0][1].features},
        counters=tuple(map(CounterCodes.concatenated, zip(*(raw.counters for _, raw in parts), strict=True))),
    )
    return replace(found if is_complete else found.spread(rows, num_users), summary=summary)


def _join(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
