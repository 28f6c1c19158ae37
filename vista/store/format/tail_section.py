"""The tail of a record: items, times, actions and features of the last events, in columns.

docs/reference/file-formats.md has the layout. B tails.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import offsets_of
from vista.log.histories import ranges
from vista.store.format.field_checks import check_field
from vista.store.format.joined_records import JoinedRecords
from vista.store.format.record_spec import SHORT_TIMES
from vista.store.format.tail_column import TailColumn
from vista.store.tail import Tail

ITEM_BYTES, TIME_BYTES, SHORT_TIME_BYTES, ACTION_BYTES = 4, 8, 4, 1


def event_bytes(short_times: NDArray[np.bool_], columns: Sequence[TailColumn]) -> NDArray[np.int64]:
    """Bytes of one event in each of B tails, by whether its times are short."""
    fixed = ITEM_BYTES + ACTION_BYTES + sum(column.dtype.itemsize for column in columns)
    return fixed + np.where(short_times, SHORT_TIME_BYTES, TIME_BYTES)


def check_tail(tail: Tail, columns: Sequence[TailColumn], num_users: int) -> None:
    """Raise ValueError unless a tail has these columns of features, and its arrays belong to `num_users` users."""
    names = [column.name for column in columns]
    if sorted(tail.features) != sorted(names):
        raise ValueError(f"tail: its features are {list(tail.features)}, but records of this store hold {names}")
    arrays = (tail.items, tail.times, tail.actions, *tail.features.values())
    if len(tail.offsets) != num_users + 1 or any(len(array) != tail.offsets[-1] for array in arrays):
        raise ValueError(f"tail: the lengths of its arrays do not match each other, or the {num_users} users")


def have_short_times(tail: Tail, last_event_ts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether all times of each of B tails are less than 2^32 ms before the user's newest event, [B]."""
    owner = np.repeat(np.arange(len(last_event_ts)), np.diff(tail.offsets))
    before = last_event_ts[owner] - tail.times
    short = np.ones(len(last_event_ts), bool)
    short[owner[(before < 0) | (before >= 1 << 32)]] = False
    return short


def encode_tails(
    tail: Tail, last_event_ts: NDArray[np.int64], short_times: NDArray[np.bool_], columns: Sequence[TailColumn]
) -> list[list[memoryview]]:
    """The parts of each user's tail section.

    Args:
        tail: of B users.
        last_event_ts: [B] times that short times count from.
        short_times: [B] whether a tail is stored with short times.
        columns: of the tail's features.
    """
    lengths = np.diff(tail.offsets)
    items = _flat(np.ascontiguousarray(tail.items, dtype="<i4"))
    times = _flat(np.ascontiguousarray(tail.times, dtype="<i8"))
    short = _flat((np.repeat(last_event_ts, lengths) - tail.times).astype("<u4")) if short_times.any() else times
    actions = _flat(np.ascontiguousarray(tail.actions, dtype=np.uint8))
    features = [(column.dtype.itemsize, _flat(column.stored(tail.features[column.name]))) for column in columns]
    return [
        [
            items[4 * first : 4 * last],
            short[4 * first : 4 * last] if is_short else times[8 * first : 8 * last],
            actions[first:last],
            *(values[size * first : size * last] for size, values in features),
        ]
        for (first, last), is_short in zip(
            pairwise(np.asarray(tail.offsets).tolist()), short_times.tolist(), strict=True
        )
    ]


def read_tails(
    records: JoinedRecords,
    first: NDArray[np.int64] | int,
    lengths: NDArray[np.int64],
    columns: Sequence[TailColumn],
    keys: Sequence[bytes],
) -> Tail:
    """The tails of records whose lengths were checked.

    Args:
        records: B records.
        first: place of the section in each record, [B] or the same for all.
        lengths: [B] events of each tail.
        columns: of the tails' features.
        keys: the B users' keys, for errors.

    Raises:
        RecordError: a category has a value that the generation does not know, or a number is infinite; the message
            names the user.
    """
    offsets = offsets_of(lengths)
    headers = records.headers
    short = (headers["flags"] & SHORT_TIMES) != 0
    times_at = first + ITEM_BYTES * lengths
    actions_at = first + (event_bytes(short, ()) - ACTION_BYTES) * lengths
    items = np.array(records.cut(first, times_at)).reshape(-1).view("<i4")
    actions = np.array(records.cut(actions_at, actions_at + lengths)).reshape(-1)
    features = _read_features(records, actions_at + lengths, lengths, columns, keys)
    if not short.any():
        times = np.array(records.cut(times_at, actions_at)).reshape(-1).view("<i8")
        return Tail(items, times, actions, offsets, features)
    times = np.repeat(headers["last_event_ts"].astype(np.int64), lengths)
    if short.all():
        times -= np.ascontiguousarray(records.cut(times_at, actions_at)).reshape(-1).view("<u4")
        return Tail(items, times, actions, offsets, features)
    content, is_short = np.frombuffer(records.content, np.uint8), np.repeat(short, lengths)
    start = records.starts + times_at
    times[is_short] -= content[ranges(start[short], SHORT_TIME_BYTES * lengths[short])].view("<u4")
    times[~is_short] = content[ranges(start[~short], TIME_BYTES * lengths[~short])].view("<i8")
    return Tail(items, times, actions, offsets, features)


def _read_features(
    records: JoinedRecords,
    first: NDArray[np.int64],
    lengths: NDArray[np.int64],
    columns: Sequence[TailColumn],
    keys: Sequence[bytes],
) -> dict[str, NDArray[Any]]:
    """The features of B tails, whose columns begin at `first` [B] in each record."""
    features = {}
    for column in columns:
        last = first + column.dtype.itemsize * lengths
        stored = np.array(records.cut(first, last)).reshape(-1).view(column.dtype)
        is_number = column.size is None
        is_valid = ~np.isinf(stored) if is_number else stored <= column.size
        if not is_valid.all():
            event = np.flatnonzero(~is_valid)[:1]
            users = [keys[user] for user in np.repeat(np.arange(len(lengths)), lengths)[event]]
            expected = "a finite number" if is_number else f"at most {column.size}"
            check_field(is_valid[event], users, stored[event], f"feature {column.name!r}", expected)
        features[column.name] = column.read(stored)
        first = last
    return features


def _flat(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
