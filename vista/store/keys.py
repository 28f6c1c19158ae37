"""Keys of the summary store: `u`, a type byte, the raw user id (docs/reference/file-formats.md, "Keys").

Integers are big-endian with the sign bit flipped, so that byte order is numeric order; strings are their UTF-8 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vista.arrays import id_array
from vista.errors import UserKeyError

MAX_KEY_BYTES = 511
"""LMDB's limit."""

INT_PREFIX = b"ui"
STR_PREFIX = b"us"

KINDS = {INT_PREFIX: "int", STR_PREFIX: "str"}
"""Type of the ids by a key's first two bytes."""

CURSOR_KEY = b"!cursor"
COMPLETE_KEY = b"!complete"
MANIFEST_KEY = b"!manifest"
ITEMS_KEY = b"!items"
"""Of the values of items."""

_SIGN_BIT = np.uint64(1 << 63)


def user_keys(user_ids: Sequence[int] | Sequence[str] | NDArray[Any]) -> list[bytes]:
    """Keys of a batch of users.

    Args:
        user_ids: integers in the range of int64, or strings; a list, a tuple or a one-dimensional NumPy array.

    Returns:
        One key per id, in the same order.

    Raises:
        UserKeyError: an id is of another type, out of the range of int64, or longer than 509 bytes of UTF-8.
    """
    if isinstance(user_ids, np.ndarray):
        if user_ids.ndim != 1:
            raise UserKeyError(f"user ids must be one-dimensional, got shape {user_ids.shape}")
        if user_ids.dtype.kind in "iu":
            if user_ids.dtype == np.uint64 and user_ids.size and int(user_ids.max()) >= 1 << 63:
                raise UserKeyError(f"user id {int(user_ids.max())} does not fit int64; use strings as user ids")
            return _int_keys(user_ids.astype(np.int64))
        user_ids = user_ids.tolist()
    kinds = set(map(type, user_ids))
    if kinds == {int}:
        try:
            return _int_keys(np.array(user_ids, dtype=np.int64))
        except OverflowError:
            pass  # The loop below reports the id.
    return [user_key(user) for user in user_ids]


def user_key(user_id: int | str) -> bytes:
    """Key of one user; errors as in `user_keys`."""
    if isinstance(user_id, str):
        try:
            key = STR_PREFIX + user_id.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserKeyError(
                f"user id {user_id!r} cannot be encoded as UTF-8 ({error.reason}); decode it correctly"
            ) from error
        if len(key) > MAX_KEY_BYTES:
            raise UserKeyError(
                f"user id {user_id[:40]!r}… takes {len(key) - 2} bytes, but a key holds at most {MAX_KEY_BYTES - 2}; "
                "hash such ids to shorter ones before `prepare`"
            )
        return key
    if isinstance(user_id, (int, np.integer)) and not isinstance(user_id, bool):
        if not -(1 << 63) <= int(user_id) < 1 << 63:
            raise UserKeyError(f"user id {user_id} does not fit int64; use strings as user ids")
        return INT_PREFIX + ((int(user_id) + (1 << 63)).to_bytes(8, "big"))
    raise UserKeyError(f"user id {user_id!r} is a {type(user_id).__name__}; user ids must be integers or strings")


def user_id(key: bytes) -> int | str:
    """User id of a key. Raises UserKeyError if the bytes are not a user key."""
    if key[:2] == INT_PREFIX and len(key) == 10:
        return int.from_bytes(key[2:], "big") - (1 << 63)
    if key[:2] == STR_PREFIX:
        try:
            return key[2:].decode("utf-8")
        except UnicodeDecodeError:
            pass
    raise UserKeyError(f"{key!r} is not a user key")


def kinds_of(keys: Sequence[bytes]) -> set[str]:
    """Types of the ids that keys stand for: int, str, or mixed for bytes that are not a user key."""
    return {KINDS.get(prefix, "mixed") for prefix in {key[:2] for key in keys}}


def common_kind(kinds: Iterable[str | None]) -> str | None:
    """Type of the ids of several sets together: int, str, mixed, or None if all are empty."""
    distinct = set(kinds) - {None}
    return None if not distinct else distinct.pop() if len(distinct) == 1 else "mixed"


def _int_keys(ids: NDArray[np.int64]) -> list[bytes]:
    packed = (ids.view(np.uint64) ^ _SIGN_BIT).astype(">u8").tobytes()
    return [INT_PREFIX + packed[start : start + 8] for start in range(0, len(packed), 8)]


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
        [N] uint64, to be computed once per entry of a vocabulary. For a whole log:
        `item_keys(log.items.ids(all_rows))[event_rows]`.

    Raises:
        TypeError: the ids are neither integers nor strings.
    """
    array = id_array(item_ids)
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
    """XXH3-64 of each event's 17 little-endian bytes: item key (8), time int64 (8), action uint8 (1).

    All events have the same width, for which XXH3 (its branch for 17 to 32 bytes) is a handful of NumPy operations. The
    tests check them against xxhash (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md).

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

    So events can be added and subtracted.

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
