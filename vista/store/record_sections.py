"""The tail of a record: items, times, actions and features of the last events, in columns.

docs/reference/file-formats.md has the layout. B tails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import offsets_of
from vista.counters.counter_codes import CODE_BITS, MAX_CODE, CounterCodes
from vista.log.histories import ranges
from vista.store.record_spec import SHORT_TIMES, CounterLayout, JoinedRecords, TailColumn, UserColumn, check_field


@dataclass(frozen=True, slots=True)
class Tail:
    """Last events of B users, packed: users end to end, oldest event first."""

    items: NDArray[np.int32]
    """[N] item rows of the model's vocabulary (in records), 0 for unknown items."""
    times: NDArray[np.int64]
    """[N] ms, or the ordinal in a log without times."""
    actions: NDArray[np.uint8]
    """[N] action codes. Callers of the scorer can pass names."""
    offsets: NDArray[np.int64]
    """[B+1]."""
    features: Mapping[str, Any] = field(default_factory=dict)
    """By name of a column, [N] each: in records, int32 codes of the model's values, -1 for a missing one, or float32
    numbers, NaN for a missing one. Callers of the scorer pass the values themselves."""

    @staticmethod
    def empty(num_users: int) -> Tail:
        """Tails without events and columns of features."""
        return Tail(
            np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.uint8), np.zeros(num_users + 1, np.int64)
        )

    @staticmethod
    def concatenated(tails: Sequence[Tail]) -> Tail:
        """The tails of all parts, end to end; at least one part, all with the same columns of features."""
        if len(tails) == 1:
            return tails[0]
        return Tail(
            np.concatenate([tail.items for tail in tails]),
            np.concatenate([tail.times for tail in tails]),
            np.concatenate([tail.actions for tail in tails]),
            offsets_of(np.concatenate([np.diff(tail.offsets) for tail in tails])),
            {name: np.concatenate([tail.features[name] for tail in tails]) for name in tails[0].features},
        )

    def select(self, index: Any, offsets: NDArray[np.int64]) -> Tail:
        """The events at `index`, as NumPy indexes, with new offsets."""
        features = {name: column[index] for name, column in self.features.items()}
        return Tail(self.items[index], self.times[index], self.actions[index], offsets, features)

    def of_user(self, row: int) -> Tail:
        """The tail of one of the users (B = 1)."""
        start, stop = self.offsets[row : row + 2].tolist()
        return self.select(slice(start, stop), np.array([0, stop - start], np.int64))


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


# The features of the user of a record, in columns (docs/reference/file-formats.md). B users.


def encode_users(features: Mapping[str, Any], columns: Sequence[UserColumn], num_users: int) -> NDArray[np.uint8]:
    """The section of each of B users, [B, bytes].

    Args:
        features: by name, [B] codes or numbers, as in `UserSummaries.features`.
        columns: of the generation.
        num_users: B.

    Raises:
        ValueError: the features are of other columns, or of another number of users.
    """
    names = [column.name for column in columns]
    if sorted(features) != sorted(names) or any(len(values) != num_users for values in features.values()):
        raise ValueError(f"features of users: expected {names} of {num_users} users, got {list(features)}")
    parts = [
        column.stored(features[column.name]).view(np.uint8).reshape(num_users, column.dtype.itemsize)
        for column in columns
    ]
    return np.concatenate([np.zeros((num_users, 0), np.uint8), *parts], axis=1)


def read_users(
    records: JoinedRecords, first: int, columns: Sequence[UserColumn], keys: Sequence[bytes]
) -> dict[str, NDArray[Any]]:
    """The features of B records whose lengths were checked; int32 codes, -1 for a missing one, or float32 numbers [B].

    Args:
        records: B records.
        first: place of the section in each record.
        columns: of the generation.
        keys: the B users' keys, for errors.

    Raises:
        RecordError: a category has a value that the generation does not know, or a number is infinite; the message
            names the user.
    """
    features = {}
    for column in columns:
        last = first + column.dtype.itemsize
        stored = np.ascontiguousarray(records.cut(first, last)).reshape(-1).view(column.dtype)
        name = f"feature {column.name!r} of the user"
        if column.size is None:
            check_field(~np.isinf(stored), keys, stored, name, "a finite number")
        else:
            check_field(stored <= column.size, keys, stored, name, f"at most {column.size}")
        features[column.name] = column.read(stored)
        first = last
    return features


# The counters of a record: per field the number of keys, then keys with codes (docs/reference/file-formats.md).
#
# B users, E keys of all users together, k bytes per key, c bytes per key for its codes, F codes per key.

SIZE_BYTES = 2
"""The number of keys of a field, uint16."""


def most_bytes(layout: CounterLayout) -> int:
    """Bytes of the section of a user who has all keys that a record keeps."""
    fields = zip(layout.spec.keys, layout.key_bytes, strict=True)
    return sum(SIZE_BYTES + keys * (key_bytes + layout.code_bytes) for keys, key_bytes in fields)


def encode_counters(counters: Sequence[CounterCodes], layout: CounterLayout, num_users: int) -> list[bytes]:
    """The counters section of each of B users.

    Args:
        counters: of the B users, one for each field of the layout.
        layout: of the generation.
        num_users: B.

    Raises:
        ValueError: the counters are of another spec, or of another number of users; or a user has too many keys, or a
            key has too many bytes.
    """
    spec = layout.spec
    if len(counters) != len(spec.fields) or any(
        one.spec != spec or len(one.offsets) != num_users + 1 or len(one.key) != one.offsets[-1] for one in counters
    ):
        raise ValueError(f"counters: expected those of {num_users} users for each of {', '.join(spec.fields)}")
    sections = [b""] * num_users
    for one, name, most, key_bytes in zip(counters, spec.fields, spec.keys, layout.key_bytes, strict=True):
        sizes = np.diff(one.offsets)
        if (sizes > most).any() or (one.key >> 8 * key_bytes != 0).any():
            raise ValueError(f"counters of {name}: at most {most} keys of {key_bytes} bytes are allowed per user")
        entries = _entries(one, key_bytes, layout.code_bytes)
        content, entry_bytes = entries.tobytes(), entries.shape[1]
        for user, (first, last) in enumerate(pairwise(one.offsets.tolist())):
            size = (last - first).to_bytes(SIZE_BYTES, "little")
            sections[user] += size + content[entry_bytes * first : entry_bytes * last]
    return sections


def counter_sizes(
    records: JoinedRecords, first: int, layout: CounterLayout, keys: Sequence[bytes]
) -> list[NDArray[np.int64]]:
    """Number of keys of each field per user, [B] for each field, checked against the length of the section.

    Args:
        records: B records with a `counters_length` that lies within each of them.
        first: place of the section in each record.
        layout: of the generation.
        keys: the B users' keys, for errors.

    Raises:
        RecordError: the fields do not fill the section exactly; the message names the user.
    """
    length = records.headers["counters_length"].astype(np.int64)
    sizes, at = [], np.zeros_like(length)
    for most, key_bytes in zip(layout.spec.keys, layout.key_bytes, strict=True):
        check_field(at + SIZE_BYTES <= length, keys, length, "counters_length", at + SIZE_BYTES)
        size = np.ascontiguousarray(records.cut(first + at, first + at + SIZE_BYTES)).reshape(-1).view("<u2")
        check_field(size <= most, keys, size, "number of counted keys", f"at most {most}")
        sizes.append(size.astype(np.int64))
        at = at + SIZE_BYTES + sizes[-1] * (key_bytes + layout.code_bytes)
    check_field(at == length, keys, length, "counters_length", at)
    return sizes


def read_counters(
    records: JoinedRecords, first: int, layout: CounterLayout, sizes: Sequence[NDArray[np.int64]]
) -> tuple[CounterCodes, ...]:
    """The counters of checked records, one for each field.

    Args:
        records: B records.
        first: place of the section in each record.
        layout: of the generation.
        sizes: from `counter_sizes`.
    """
    counters, clock = [], records.headers["last_event_ts"].astype(np.int64)
    at = np.full(len(clock), first, np.int64)
    for size, key_bytes in zip(sizes, layout.key_bytes, strict=True):
        at = at + SIZE_BYTES
        stop = at + size * (key_bytes + layout.code_bytes)
        entries = np.ascontiguousarray(records.cut(at, stop)).reshape(-1, key_bytes + layout.code_bytes)
        key, packed = _widened(entries[:, :key_bytes], 4), _widened(entries[:, key_bytes:], 8)
        codes = np.empty((len(entries), layout.spec.num_columns), np.uint8)
        for column in range(layout.spec.num_columns):
            codes[:, column] = packed >> np.uint64(CODE_BITS * column) & np.uint64(MAX_CODE)
        offsets = offsets_of(size)
        counters.append(CounterCodes(layout.spec, key.view("<i4"), codes, offsets, clock))
        at = stop
    return tuple(counters)


def _entries(counters: CounterCodes, key_bytes: int, code_bytes: int) -> NDArray[np.uint8]:
    """The bytes of each key and its codes, [E, k + c]."""
    key = counters.key.astype("<u4")[:, None].view(np.uint8)
    shifted = counters.codes.astype("<u8") << CODE_BITS * np.arange(counters.codes.shape[1], dtype=np.uint64)
    packed = np.bitwise_or.reduce(shifted, axis=1, keepdims=True).view(np.uint8)
    return np.concatenate([key[:, :key_bytes], packed[:, :code_bytes]], axis=1)


def _widened(number: NDArray[np.uint8], width: int) -> NDArray[Any]:
    """Little-endian numbers [E, bytes] as unsigned integers of `width` bytes, [E]."""
    wide = np.zeros((len(number), width), np.uint8)
    wide[:, : number.shape[1]] = number
    return wide.view(f"<u{width}")[:, 0]
