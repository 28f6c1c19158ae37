"""The counters of a record: per field the number of keys, then keys with codes (docs/reference/file-formats.md).

B users, E keys of all users together, k bytes per key, c bytes per key for its codes, F codes per key.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import offsets_of
from vista.counters.counter_codes import CODE_BITS, MAX_CODE, CounterCodes
from vista.store.format.counter_layout import CounterLayout
from vista.store.format.field_checks import check_field
from vista.store.format.joined_records import JoinedRecords

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
    for one, field, most, key_bytes in zip(counters, spec.fields, spec.keys, layout.key_bytes, strict=True):
        sizes = np.diff(one.offsets)
        if (sizes > most).any() or (one.key >> 8 * key_bytes != 0).any():
            raise ValueError(f"counters of {field}: at most {most} keys of {key_bytes} bytes are allowed per user")
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
