"""History digest: the sum mod 2^64 of the XXH3-64 of each event, so that events can be added and subtracted.

An event is hashed as 17 little-endian bytes: item key (8), time int64 (8), action uint8 (1). The item key is the raw
int64 id itself, or XXH3-64 of the UTF-8 bytes of a string id. It is computed once per vocabulary entry, so that all
events have the same width, for which XXH3 (its branch for 17 to 32 bytes) is a handful of NumPy operations. The tests
check them against xxhash (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

EVENT_BYTES = 17

_CHUNK = 8192  # events whose temporaries fit the second-level cache
_PRIME64_1 = 0x9E3779B185EBCA87
_AVALANCHE = np.uint64(0x165667919E3779F9)
_SECRET = np.frombuffer(
    bytes.fromhex("b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"), dtype="<u8"
).astype(np.uint64)
_START = np.uint64((EVENT_BYTES * _PRIME64_1) % (1 << 64))
_LOW = np.uint64(0xFFFFFFFF)


def item_keys(item_ids: Sequence[int] | Sequence[str] | NDArray[Any]) -> NDArray[np.uint64]:
    """8-byte keys of raw item ids: the bits of an integer id, or XXH3-64 of the UTF-8 bytes of a string id.

    Args:
        item_ids: [N] int64, or [N] strings (list or NumPy array).

    Returns:
        [N] uint64. For a whole log: `item_keys(log.items.ids(all_rows))[event_rows]`.

    Raises:
        TypeError: the ids are neither integers nor strings.
    """
    array = np.asarray(item_ids)
    if array.dtype.kind in "iu":
        return array.astype(np.int64).view(np.uint64)
    if array.size == 0:
        return np.zeros(0, dtype=np.uint64)
    if array.dtype.kind not in "UO" or not all(isinstance(item, str) for item in array.tolist()):
        raise TypeError(f"item ids must be integers or strings, got {array.dtype}")
    return np.fromiter(
        (xxhash.xxh3_64_intdigest(item.encode("utf-8")) for item in array.tolist()), dtype=np.uint64, count=array.size
    )


def event_digests(keys: NDArray[np.uint64], times: NDArray[np.int64], actions: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """XXH3-64 of each event's 17 bytes.

    Args:
        keys: [T] uint64 from `item_keys`.
        times: [T] int64 (ms, or the ordinal in a log without times).
        actions: [T] uint8 codes.

    Returns:
        [T] uint64.

    Raises:
        ValueError: the lengths differ.
    """
    total = len(keys)
    if len(times) != total or len(actions) != total:
        raise ValueError(f"keys, times and actions differ in length: {total}, {len(times)}, {len(actions)}")
    digests = np.empty(total, dtype=np.uint64)
    times_bits = np.ascontiguousarray(times, dtype=np.int64).view(np.uint64)
    action_bits = np.asarray(actions, dtype=np.uint8)
    with np.errstate(over="ignore"):  # All arithmetic is mod 2^64 by definition.
        for start in range(0, total, _CHUNK):
            part = slice(start, start + _CHUNK)
            item, time = keys[part], times_bits[part]
            action = action_bits[part].astype(np.uint64)
            # Bytes 0..15 and bytes 1..16 of the event, each as two little-endian words.
            first = _fold(item ^ _SECRET[0], time ^ _SECRET[1])
            last_low = (item >> np.uint64(8)) | (time << np.uint64(56))
            last_high = (time >> np.uint64(8)) | (action << np.uint64(56))
            digest = _START + first + _fold(last_low ^ _SECRET[2], last_high ^ _SECRET[3])
            digest ^= digest >> np.uint64(37)
            digest *= _AVALANCHE
            digest ^= digest >> np.uint64(32)
            digests[part] = digest
    return digests


def history_digests(
    keys: NDArray[np.uint64], times: NDArray[np.int64], actions: NDArray[np.uint8], offsets: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Digest of each packed history: the sum mod 2^64 of its events' digests (0 for an empty history).

    Args:
        keys, times, actions: [T] as in `event_digests`, users end to end.
        offsets: [B+1] int64.

    Returns:
        [B] uint64.
    """
    sums = np.zeros(len(keys) + 1, dtype=np.uint64)
    np.cumsum(event_digests(keys, times, actions), out=sums[1:])  # wraps, as the definition requires
    return sums[offsets[1:]] - sums[offsets[:-1]]


def _fold(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """XOR of the low and the high word of the 128-bit product."""
    shift = np.uint64(32)
    a_low, a_high, b_low, b_high = a & _LOW, a >> shift, b & _LOW, b >> shift
    high_low = a_high * b_low
    cross = ((a_low * b_low) >> shift) + (high_low & _LOW) + a_low * b_high
    upper = (high_low >> shift) + (cross >> shift) + a_high * b_high
    folded: NDArray[np.uint64] = upper ^ (a * b)
    return folded
