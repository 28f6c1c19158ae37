"""The tail of a record: items, times and actions of the last events, in columns (docs/reference/file-formats.md)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.store.format.joined_records import JoinedRecords
from vista.store.tail import Tail

TAIL_EVENT_BYTES = 13
"""Item row int32, time int64, action uint8."""


def check_tail(tail: Tail, num_users: int) -> None:
    """Raise ValueError unless the arrays of a tail belong to `num_users` users."""
    if len(tail.offsets) != num_users + 1 or not (
        len(tail.items) == len(tail.times) == len(tail.actions) == tail.offsets[-1]
    ):
        raise ValueError(f"tail: the lengths of its arrays do not match each other, or the {num_users} users")


def encode_tails(tail: Tail) -> list[list[memoryview]]:
    """The parts of each user's tail section."""
    items = _flat(np.ascontiguousarray(tail.items, dtype="<i4"))
    times = _flat(np.ascontiguousarray(tail.times, dtype="<i8"))
    actions = _flat(np.ascontiguousarray(tail.actions, dtype=np.uint8))
    return [
        [items[4 * first : 4 * last], times[8 * first : 8 * last], actions[first:last]]
        for first, last in pairwise(np.asarray(tail.offsets).tolist())
    ]


def read_tails(records: JoinedRecords, first: int, lengths: NDArray[np.int64]) -> Tail:
    """The tails of checked records.

    Args:
        records: B records.
        first: place of the section in each record.
        lengths: [B] events of each tail.
    """
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    items, times, actions = (
        np.array(records.cut(first + start * lengths, first + stop * lengths)).reshape(-1)
        for start, stop in pairwise((0, 4, 12, TAIL_EVENT_BYTES))
    )
    return Tail(items.view("<i4"), times.view("<i8"), actions, offsets)


def _flat(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
